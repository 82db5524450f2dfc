"""Goodput: which part of a run's time went into steps that counted, and what took the rest."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from etils import epath

from distill_jax import artifacts, parallel

GOODPUT_FILE = "goodput.json"
"""What a run's sessions did with their time, in its directory."""
STEP, START_UP, COMPILE, DATA, CHECKPOINT = "step", "start-up", "compile", "data", "checkpoint"
"""What a session does: `STEP` is good, the rest is not."""
ROLLOUT = "rollout"
"""The part of a step in which the model writes what it learns from."""
_RECOMPUTED, _DOWN = "recomputed", "down"
# Between records, unless a checkpoint asks for one.
_EVERY_S = 60.0


class Goodput:
    """Counts the seconds of one session, from its start to its end, whatever ends it.

    A session is one call of `train`. All its time is `STEP`, `ROLLOUT` included, but for the
    start-up and the other blocks of `on`. A record of it is left now and then, so that a kill loses
    little.

    Args:
      directory: of the run.
    """

    def __init__(self, directory: epath.Path):
        self._path = directory / GOODPUT_FILE
        self._before = read_sessions(directory)
        self._start = time.time()
        self._clock = self._written = time.monotonic()
        self._seconds = dict.fromkeys((START_UP, COMPILE, DATA, CHECKPOINT), 0.0)
        self._first: int | None = None
        self._last: int | None = None
        parallel.at(0, START_UP)

    def begin(self, step: int) -> None:
        """Ends the start-up: the session goes on after this step."""
        self._first = self._last = step
        self._seconds[START_UP] += time.monotonic() - self._clock

    @contextlib.contextmanager
    def on(self, what: str, step: int, *, unless_busy: Any = None) -> Iterator[None]:
        """A block whose time is `what`'s; whoever watches this process sees it there.

        Args:
          what: `STEP`, `ROLLOUT`, `COMPILE`, `DATA` or `CHECKPOINT`.
          step: which one it is done for.
          unless_busy: what the devices compute meanwhile; if that is not ended when the block is,
            the block cost nothing, and its time is `STEP`.
        """
        parallel.at(step, what)
        start = time.monotonic()
        try:
            yield
        finally:
            if what in self._seconds and (unless_busy is None or unless_busy.is_ready()):
                self._seconds[what] += time.monotonic() - start
            parallel.at(step, STEP)

    def done(self, step: int, *, record: bool = False) -> None:
        """Notes that a step was done; leaves a record if asked to, or if it is time."""
        self._last = step
        if record or time.monotonic() - self._written > _EVERY_S:
            self._record()

    def __enter__(self) -> "Goodput":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._record()

    def _record(self) -> None:
        """Leaves the record of this session beside those before; process 0 alone does."""
        self._written = time.monotonic()
        if parallel.is_main():
            artifacts.write_json(self._path, [*self._before, self._session()])

    def _session(self) -> dict[str, Any]:
        wall = time.monotonic() - self._clock
        seconds = dict(self._seconds)
        if self._first is None:  # it ended before its first step
            seconds[START_UP] = wall
        return {
            "start": self._start,
            "end": self._start + wall,
            "first": self._first,
            "last": self._last,
            "seconds": {STEP: max(wall - sum(seconds.values()), 0.0), **seconds},
        }


def read_sessions(directory: epath.Path) -> list[dict[str, Any]]:
    """The records of a run's sessions, oldest first."""
    path = directory / GOODPUT_FILE
    return artifacts.read_json(path) if path.exists() else []


def account(sessions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a run's sessions did with the time from the first one's start to the last one's end.

    Steps that a session did beyond where the next one that began went on were lost: their share of
    its step time counts as recomputed. Time between two sessions counts as down.

    Returns:
      "wall", in seconds; "goodput", the part of it that went into steps which counted; "seconds",
      by cause, that add up to "wall"; and "sessions", how many there were. Nothing of no session.
    """
    if not sessions:
        return {}
    seconds = dict.fromkeys((STEP, START_UP, COMPILE, DATA, CHECKPOINT, _RECOMPUTED, _DOWN), 0.0)
    for number, session in enumerate(sessions):
        for what, spent in session["seconds"].items():
            seconds[what] += spent
        if number + 1 < len(sessions):
            seconds[_DOWN] += max(sessions[number + 1]["start"] - session["end"], 0.0)
        later = [other["first"] for other in sessions[number + 1 :] if other["first"] is not None]
        if session["first"] is not None and later:
            steps = session["last"] - session["first"]
            lost = min(max(session["last"] - later[0], 0), steps)
            again = session["seconds"][STEP] * lost / max(steps, 1)
            seconds[STEP] -= again
            seconds[_RECOMPUTED] += again
    wall = sum(seconds.values())
    return {
        "wall": wall,
        "goodput": seconds[STEP] / wall if wall else 0.0,
        "seconds": seconds,
        "sessions": len(sessions),
    }


def account_line(found: Mapping[str, Any]) -> str:
    """What `account` returned, as a person reads it."""
    wall = found["wall"]
    causes = sorted(found["seconds"].items(), key=lambda item: -item[1])
    lost = ", ".join(f"{what} {spent:.1f} s" for what, spent in causes if what != STEP and spent)
    return f"goodput {found['goodput']:.1%} of {wall:.1f} s" + (f"; {lost}" if lost else "")
