"""Several processes that do one job: start-up, and word from one to all.

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
from jax._src import clusters

# The client of JAX's coordination service has no public name yet.
from jax._src.distributed import global_state

from distill_jax.artifacts import InputError

WAIT_S = 1800.0
"""How long processes wait for each other unless told otherwise."""
# How long a process that failed waits to be heard. Others may hang where it never comes, and are
# ended by JAX once it is gone.
_TELL_S = 300.0
_ADDRESS, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_PREFIX = "distill_jax"
# Those that JAX knows and that cost nothing to ask for.
_CLUSTERS = {"gcetpu", "gketpu", "ompi", "slurm"}

_Result = TypeVar("_Result")


class ProcessError(RuntimeError):
    """Another process failed or did not come; the message is one line that names it."""


class _State:
    """What is to be kept in step on all processes.

    Attributes:
      calls: calls of `gather` so far, which number the meeting points.
      blocks: blocks of `together` that are open.
    """

    calls = 0
    blocks = 0


def start() -> None:
    """Joins the other processes of this job, if its environment says that there are any.

    On Cloud TPU, under SLURM and Open MPI nothing need be said; elsewhere JAX_COORDINATOR_ADDRESS
    ("host:port" of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID do it. Must come before the
    first use of a device; a second call does nothing. Devices that JAX_NUM_CPU_DEVICES makes of
    fewer cores get threads enough.

    Raises:
      InputError: one of the three is missing or makes no sense.
    """
    _give_fake_devices_threads()
    if jax.distributed.is_initialized():
        return
    if _ADDRESS in os.environ:
        address, processes, process = os.environ[_ADDRESS], _number(_COUNT), _number(_INDEX)
        if not address.rpartition(":")[2].isdecimal() or ":" not in address:
            raise InputError(f"{_ADDRESS}: {address!r} is not host:port")
        if process >= processes:
            raise InputError(f"{_INDEX}: {process} is not below {_COUNT}, which is {processes}")
        jax.distributed.initialize(
            address,
            processes,
            process,
            cluster_detection_method="deactivate",
        )
    elif _is_cluster():
        jax.distributed.initialize()


def _give_fake_devices_threads() -> None:
    """A device in a collective holds a thread of XLA's pool, which has one for each core.

    With more devices than threads they would wait for each other for ever.
    """
    devices = jax.config.values["jax_num_cpu_devices"]
    if devices > (os.cpu_count() or 1):
        os.environ.setdefault("NPROC", str(2 * devices))


def index() -> int:
    """The number of this process, without waking a backend."""
    return global_state.process_id


def count() -> int:
    """How many processes there are."""
    return global_state.num_processes


def is_main() -> bool:
    """Whether this is process 0, which speaks for all."""
    return index() == 0


def gather(value: Any = None, *, what: str = "the next step", seconds: float = WAIT_S) -> list[Any]:
    """Every process's value, in their order; waits until all have given theirs.

    Args:
      value: a JSON value, of a few kilobytes at most.
      what: where they meet, for messages.
      seconds: how long to wait.

    Raises:
      ProcessError: a process failed in a block of `together`, or did not come in time.
    """
    if count() == 1:
        return [value]
    return [found["value"] for found in _meet({"value": value}, what, seconds)]


def barrier(what: str, seconds: float = WAIT_S) -> None:
    """Waits until all processes are here.

    Raises:
      ProcessError: as `gather`.
    """
    gather(what=what, seconds=seconds)


def on_main(work: Callable[[], _Result], *, what: str, seconds: float = WAIT_S) -> _Result:
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


def _meet(message: dict[str, Any], what: str, seconds: float) -> list[dict[str, Any]]:
    """Messages of all processes, in their order, of which none is of an error."""
    client, number = global_state.client, _State.calls
    assert client is not None  # there are several processes
    _State.calls += 1
    place = f"{_PREFIX}/{number}"
    client.key_value_set(f"{place}/{index()}", json.dumps(message))
    late = None
    try:
        client.wait_at_barrier(f"{place}/barrier", round(seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        late = error
    found = {
        int(key.rpartition("/")[2]): json.loads(text)
        for key, text in client.key_value_dir_get(f"{place}/")
    }
    for process, other in sorted(found.items()):
        if "error" in other and process != index():
            raise ProcessError(f"process {process} of {count()} failed: {other['error']}") from late
    if late is not None:
        missing = ", ".join(str(i) for i in range(count()) if i not in found)
        who = f"process {missing}" if missing else f"this process {index()}"
        raise ProcessError(f"{who} of {count()} did not reach {what} in {seconds:g} s") from late
    if is_main() and number:
        # All have read these before they came here.
        client.key_value_delete(f"{_PREFIX}/{number - 1}/")
    return [found[process] for process in range(count())]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise InputError(f"{name}: {text!r} is no number, and {_ADDRESS} is set")
    return int(text)


def _is_cluster() -> bool:
    """Whether JAX finds several processes in the environment by itself."""
    kinds = [kind for kind in clusters.ClusterEnv._cluster_types if kind.name in _CLUSTERS]
    found = next((kind for kind in kinds if kind.is_env_present()), None)
    return found is not None and found.get_process_count() > 1
