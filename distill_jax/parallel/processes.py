"""Several processes that do one job: word from one to all.

Nothing here touches a device, so that what failed on one process, or is late, is told where a
collective would only hang. Calls must come in the same order on all processes; with one process
they cost nothing.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax

# The client of JAX's coordination service has no public name yet.
from jax._src.distributed import global_state

from distill_jax.artifacts import InputError

EXIT_AGAIN = 75
"""Exit status of a job that the same command goes on with: preempted, or a process was lost."""
_WAIT, _WAIT_S = "DISTILL_JAX_WAIT_S", 1800.0
# How long a process that failed waits to be heard. Others may hang where it never comes, and are
# ended by JAX once it is gone.
_TELL_S = 300.0
_PREFIX = "distill_jax"

_Result = TypeVar("_Result")


class ProcessError(RuntimeError):
    """Another process failed or did not come; the message is one line that names it."""


class ProcessLost(ProcessError):
    """Another process did not come, and said nothing."""


class _State:
    """What is to be kept in step on all processes.

    Attributes:
      calls: calls of `gather` so far, which number the meeting points.
      blocks: blocks of `together` that are open.
    """

    calls = 0
    blocks = 0


def wait_seconds(usual: float = _WAIT_S) -> float:
    """How long processes wait for each other: DISTILL_JAX_WAIT_S, or what is usual.

    Raises:
      InputError: the variable is no positive number.
    """
    text = os.environ.get(_WAIT)
    if text is None:
        return usual
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise InputError(f"{_WAIT}: {text!r} is not a number of seconds")
    return seconds


def client() -> Any:
    """JAX's coordination service, as one of several processes has it."""
    found = global_state.client
    assert found is not None  # there are several processes
    return found


def index() -> int:
    """The number of this process, without waking a backend."""
    return global_state.process_id


def count() -> int:
    """How many processes there are."""
    return global_state.num_processes


def is_main() -> bool:
    """Whether this is process 0, which speaks for all."""
    return index() == 0


def gather(
    value: Any = None, *, what: str = "the next step", seconds: float | None = None
) -> list[Any]:
    """Every process's value, in their order; waits until all have given theirs.

    Args:
      value: a JSON value, of a few kilobytes at most.
      what: where they meet, for messages.
      seconds: how long to wait; None for `wait_seconds()`.

    Raises:
      ProcessError: a process failed in a block of `together`.
      ProcessLost: one did not come in time.
    """
    if count() == 1:
        return [value]
    return [found["value"] for found in _meet({"value": value}, what, seconds)]


def barrier(what: str, seconds: float | None = None) -> None:
    """Waits until all processes are here.

    Raises:
      ProcessError: as `gather`.
    """
    gather(what=what, seconds=seconds)


def on_main(work: Callable[[], _Result], *, what: str, seconds: float | None = None) -> _Result:
    """What `work` returns on process 0, which alone does it; a JSON value.

    Raises:
      ProcessError: as `gather`, and on all other processes if `work` fails.
    """
    with together():
        return gather(work() if is_main() else None, what=what, seconds=seconds)[0]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """An exception in this block on one process ends it on all, at their next call of `gather`.

    There they raise a ProcessError with the exception's message. So whatever may fail belongs in
    such a block, and a `gather` before each computation that all processes must join in.
    """
    _State.blocks += 1
    try:
        yield
    except Exception as error:
        # An outer block, or the process that failed first, tells of it.
        if count() > 1 and _State.blocks == 1 and not isinstance(error, ProcessError):
            with contextlib.suppress(ProcessError):
                _meet({"error": _one_line(error)}, "the end", _TELL_S)
        raise
    finally:
        _State.blocks -= 1


def _meet(message: dict[str, Any], what: str, seconds: float | None) -> list[dict[str, Any]]:
    """Messages of all processes, in their order, of which none is of an error."""
    service, number = client(), _State.calls
    seconds = wait_seconds() if seconds is None else seconds
    _State.calls += 1
    place = f"{_PREFIX}/{number}"
    service.key_value_set(f"{place}/{index()}", json.dumps(message))
    late = None
    try:
        service.wait_at_barrier(f"{place}/barrier", round(seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        late = error
    found = {
        int(key.rpartition("/")[2]): json.loads(text)
        for key, text in service.key_value_dir_get(f"{place}/")
    }
    for process, other in sorted(found.items()):
        if "error" in other and process != index():
            raise ProcessError(f"process {process} of {count()} failed: {other['error']}") from late
    if late is not None:
        missing = ", ".join(str(i) for i in range(count()) if i not in found)
        who = f"process {missing}" if missing else f"this process {index()}"
        raise ProcessLost(f"{who} of {count()} did not reach {what} in {seconds:g} s") from late
    if is_main() and number:
        # All have read these before they came here.
        service.key_value_delete(f"{_PREFIX}/{number - 1}/")
    return [found[process] for process in range(count())]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
