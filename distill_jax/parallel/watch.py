"""Which process is lost or stuck, told where the others could only hang in a collective.

Every process says where it is now and then, through JAX's coordination service; process 0 looks
at what all said, and what it finds ends them all. That is done from a thread, and at once: a main
thread that waits for a device cannot be woken. The same thread hears that the job is to stop.
"""

import atexit
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from distill_jax.parallel import processes, stopping

# Sooner than JAX itself, which would end all after 100 s without a line that a person can read.
_LOST_S = 60.0
_BEAT_S = 2.0
_PLACE = "distill_jax watch"


class _Here:
    """Where this process is.

    Attributes:
      step: of the loop that it is in.
      doing: what it does there; None outside of loops, where meetings have limits of their own.
      moves: how often it said so.
    """

    step = 0
    doing: str | None = None
    moves = 0


def at(step: int, doing: str | None) -> None:
    """Notes that this process has come to a step of a loop in which all take part."""
    _Here.step, _Here.doing = step, doing
    _Here.moves += 1


@contextlib.contextmanager
def looping() -> Iterator[None]:
    """A block in which `at` is called again and again; all processes are in it together."""
    try:
        yield
    finally:
        at(_Here.step, None)


class Judge:
    """What process 0 makes of what all said.

    Args:
      count: how many processes there are.
      lost: seconds without a word after which a process is lost.
      stall: seconds without a move of any process after which the one behind is stuck.
      now: the time at the start, in seconds.
    """

    def __init__(self, count: int, lost: float, stall: float, now: float):
        self._count, self._lost, self._stall = count, lost, stall
        self._heard = dict.fromkeys(range(count), now)
        self._beats: dict[int, int] = {}
        self._moves: dict[int, int] = {}
        self._moved = now

    def look(self, said: Mapping[int, Mapping[str, Any]], now: float) -> str | None:
        """A line that names who is lost or stuck, if anyone is.

        Args:
          said: of every process that still takes part, {"beat", "moves", "step", "doing"}.
          now: the time, in seconds.
        """
        for process, word in said.items():
            if self._beats.get(process) != word["beat"] or word["doing"] == "ended":
                self._beats[process], self._heard[process] = word["beat"], now
        moves = {process: word["moves"] for process, word in said.items()}
        if moves != self._moves or any(word["doing"] in (None, "ended") for word in said.values()):
            self._moves, self._moved = moves, now
        for process, when in sorted(self._heard.items()):
            if now - when > self._lost:
                last = f"; it was at {_where(said[process])}" if process in said else ""
                return self._line(process, f"is lost, silent for {now - when:.0f} s{last}")
        if len(said) == self._count and now - self._moved > self._stall:
            process, word = min(said.items(), key=lambda one: (*_progress(one[1]), one[0]))
            return self._line(process, f"is stuck at {_where(word)} for {self._stall:g} s")
        return None

    def _line(self, process: int, what: str) -> str:
        return f"process {process} of {self._count} {what}"


def _progress(word: Mapping[str, Any]) -> tuple[int, bool]:
    # In a step are those that wait for whoever has not come to it.
    return word["step"], word["doing"] == "step"


def _where(word: Mapping[str, Any]) -> str:
    return "no step" if word["doing"] is None else f"step {word['step']} ({word['doing']})"


class _Watch(threading.Thread):
    def __init__(self, client: Any, wait: float):
        super().__init__(name="watch", daemon=True)
        self._client, self._beat_s = client, min(_BEAT_S, wait / 40)
        self._ended = threading.Event()
        self._judge = Judge(processes.count(), min(_LOST_S, wait), wait, time.monotonic())
        self._beats = 0

    def run(self) -> None:
        while not self._ended.wait(self._beat_s):
            # Without process 0 there is no service; then JAX ends this process itself.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._say(_Here.doing)
                stopping.listen()
                verdict = self._verdict()
                if verdict is not None and not self._ended.is_set():
                    self._give_up(verdict)

    def end(self) -> None:
        """Takes leave, so that nobody misses this process."""
        self._ended.set()
        self.join()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._say("ended")

    def _say(self, doing: str | None) -> None:
        self._beats += 1
        word = {"beat": self._beats, "moves": _Here.moves, "step": _Here.step, "doing": doing}
        key = f"{_PLACE}/said/{processes.index()}"
        self._client.key_value_set(key, json.dumps(word), allow_overwrite=True)

    def _verdict(self) -> str | None:
        if processes.is_main():
            found = self._client.key_value_dir_get(f"{_PLACE}/said/")
            said = {int(key.rpartition("/")[2]): json.loads(text) for key, text in found}
            verdict = self._judge.look(said, time.monotonic())
            if verdict is not None:
                self._client.key_value_set(f"{_PLACE}/verdict/0", verdict, allow_overwrite=True)
                # The others hear of it from the service, which ends with this process.
                time.sleep(3 * self._beat_s)
            return verdict
        found = self._client.key_value_dir_get(f"{_PLACE}/verdict/")
        return found[0][1] if found else None

    def _give_up(self, verdict: str) -> None:
        line = f"distill-jax process {processes.index()}: error: {verdict}"
        print(line, file=sys.stderr, flush=True)
        os._exit(processes.EXIT_AGAIN)


def start() -> None:
    """Watches the processes of this job, from now until this one ends."""
    watch = _Watch(processes.client(), processes.wait_seconds())
    watch.start()
    # Before JAX leaves the service, which is done at exit, too.
    atexit.register(watch.end)
