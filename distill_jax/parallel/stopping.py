"""SIGTERM, which a machine sends before it is taken away: the job ends where it can go on.

Of several processes any may get it. It tells the others, and they agree on the call of `preempted`
at which all stop: while they do, each of them waits at its next call, so that none has passed the
one that follows the furthest of all. Calls must come in the same order on all processes.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax

from distill_jax.parallel import processes

_PLACE = "distill_jax stop"
_AGREE_S = 20.0


class Preempted(BaseException):
    """The job was told to stop; the same command goes on from there.

    No Exception, since nothing failed: all processes raise it at the same place.
    """


class _State:
    """What this process knows of the signal; `lock` guards what two threads change.

    Attributes:
      told: this process got it.
      asked: how often `preempted` was called.
      last: the call at which all stop; None until they agreed.
      agreeing: whether they can still agree.
      deferred: blocks of `deferring` that are open.
    """

    lock = threading.Lock()
    told = False
    asked = 0
    last: int | None = None
    agreeing = True
    deferred = 0


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """A block that SIGTERM ends with `Preempted`.

    One process ends at once, since whatever it leaves can be gone on with, but for blocks of
    `deferring`. Several end where they next ask.
    """

    def tell(*_: Any) -> None:
        _State.told = True
        if processes.count() == 1 and not _State.deferred:
            raise Preempted("stopped")

    before = signal.signal(signal.SIGTERM, tell)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _State.told = False


@contextlib.contextmanager
def deferring() -> Iterator[None]:
    """A block that asks whether to stop, and is not interrupted."""
    _State.deferred += 1
    try:
        yield
    finally:
        _State.deferred -= 1


def preempted() -> bool:
    """Whether to stop here; once true it stays so."""
    if processes.count() == 1:
        return _State.told
    with _State.lock:
        _State.asked += 1
        return _State.last is not None and _State.asked >= _State.last


def stop_if_preempted(place: str) -> None:
    """Ends the job here if it was told to stop.

    Args:
      place: where this is, for the message.

    Raises:
      Preempted: it was.
    """
    if preempted():
        raise Preempted(f"stopped {place}")


def listen() -> None:
    """Tells the others of a signal, or hears of theirs; then waits until all agree.

    For a thread of each of several processes, now and then.
    """
    client = processes.client()
    if _State.told:
        client.key_value_set(f"{_PLACE}/told", "", allow_overwrite=True)
    # A directory that is empty is no error, as a key that is missing is.
    if _State.last is None and _State.agreeing and client.key_value_dir_get(f"{_PLACE}/"):
        with _State.lock:
            client.key_value_set(f"{_PLACE}/asked/{processes.index()}", str(_State.asked))
            try:
                client.wait_at_barrier(f"{_PLACE}/barrier", round(1000 * _AGREE_S))
            except jax.errors.JaxRuntimeError:  # for all alike: one has ended, or is lost
                _State.agreeing = False
                print("the processes did not agree where to stop: they go on", file=sys.stderr)
                return
            asked = client.key_value_dir_get(f"{_PLACE}/asked/")
            _State.last = max(int(text) for _, text in asked) + 1
