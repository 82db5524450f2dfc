"""The start of a job of several processes: who takes part, and who is missing.

JAX's own start-up ends a process without saying who did not come. So process 0 first calls the
roll, on the very port at which JAX's coordination service will listen.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterable
from typing import Any

import jax
from jax._src import clusters

from distill_jax.artifacts import InputError
from distill_jax.parallel import processes, watch
from distill_jax.parallel.processes import ProcessLost

_ADDRESS, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# Those that JAX knows and that cost nothing to ask for.
_CLUSTERS = {"gcetpu", "gketpu", "ompi", "slurm"}
_START_S = 600.0
# How long whoever connected may take to say a line.
_LINE_S = 5.0
_RETRY_S = 0.2


def start() -> None:
    """Joins the other processes of this job, if its environment says that there are any.

    On Cloud TPU, on GKE, under SLURM and Open MPI nothing need be said; elsewhere, and against
    what these say, JAX_COORDINATOR_ADDRESS ("host:port" of process 0), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID do it. Must come before the first use of a device; a second call does nothing.
    Devices that JAX_NUM_CPU_DEVICES makes of fewer cores get threads enough.

    Raises:
      InputError: one of the three is missing or makes no sense, or does not fit the others'.
      ProcessLost: a process did not come within 600 s, or DISTILL_JAX_WAIT_S.
    """
    _give_fake_devices_threads()
    if jax.distributed.is_initialized():
        return
    seconds = processes.wait_seconds(_START_S)
    method = None
    if _ADDRESS in os.environ:
        address, count, index = os.environ[_ADDRESS], _number(_COUNT), _number(_INDEX)
        if not address.rpartition(":")[2].isdecimal() or ":" not in address:
            raise InputError(f"{_ADDRESS}: {address!r} is not host:port")
        if index >= count:
            raise InputError(f"{_INDEX}: {index} is not below {_COUNT}, which is {count}")
        method = "deactivate"
    elif (cluster := _cluster()) is not None:
        address = _coordinator(cluster, seconds)
        count, index = cluster.get_process_count(), cluster.get_process_id()
    else:
        return
    call_roll(address, count, index, seconds)
    # It would take SIGTERM for itself, and checkpoint managers would ask it with their own steps.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        address,
        count,
        index,
        cluster_detection_method=method,
        initialization_timeout=round(max(seconds, _LINE_S)),
    )
    if count > 1:
        watch.start()


def _give_fake_devices_threads() -> None:
    """A device in a collective holds a thread of XLA's pool, which has one for each core.

    With more devices than threads they would wait for each other for ever.
    """
    devices = jax.config.values["jax_num_cpu_devices"]
    if devices > (os.cpu_count() or 1):
        os.environ.setdefault("NPROC", str(2 * devices))


def _cluster() -> Any:
    """What JAX knows of the cluster that this is a process of, if there are several."""
    kinds = [kind for kind in clusters.ClusterEnv._cluster_types if kind.name in _CLUSTERS]
    found = next((kind for kind in kinds if kind.is_env_present()), None)
    return found if found is not None and found.get_process_count() > 1 else None


def _coordinator(cluster: Any, seconds: float) -> str:
    port = os.environ.get("JAX_COORDINATOR_PORT")
    try:
        return cluster.get_coordinator_address(timeout_secs=seconds, override_coordinator_port=port)
    except RuntimeError as error:  # the host's name is not known yet
        raise ProcessLost(f"process 0 did not start in {seconds:g} s ({error})") from error


def call_roll(address: str, count: int, index: int, seconds: float) -> None:
    """Returns once all processes of a job have said that they are there.

    Args:
      address: "host:port" of process 0; free for others to use afterwards.
      count: how many there are.
      index: the number of this one.
      seconds: how long to wait for the others.

    Raises:
      InputError: the port is taken, two have one number, or they disagree about their count.
      ProcessLost: one that is named did not come.
    """
    if count == 1:
        return
    if index == 0:
        _hear_all(int(address.rpartition(":")[2]), count, seconds)
    else:
        _say_here(address, count, index, seconds)


def _hear_all(port: int, count: int, seconds: float) -> None:
    """Process 0's part: it answers all at once, with nothing or with what is wrong."""
    deadline = time.monotonic() + seconds
    here: dict[int, socket.socket] = {}
    problem: Exception | None = None
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: _close(here.values()))
        server = stack.enter_context(_listen(port, count))
        while problem is None and not _all_here(here, count):
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = ", ".join(str(i) for i in range(1, count) if i not in here)
                problem = ProcessLost(
                    f"process {missing} of {count} did not start in {seconds:g} s"
                )
                break
            problem = _note(connection, count, here)
        lost = isinstance(problem, ProcessLost)
        answer = json.dumps({"problem": problem and str(problem), "lost": lost}) + "\n"
        for connection in here.values():
            with contextlib.suppress(OSError):
                connection.sendall(answer.encode())
    if problem is not None:
        raise problem


def _all_here(here: dict[int, socket.socket], count: int) -> bool:
    """Whether all others are here, and none of them died since it came; those are forgotten."""
    if len(here) < count - 1:
        return False
    gone = [index for index, connection in here.items() if _is_gone(connection)]
    for index in gone:
        here.pop(index).close()
    return not gone


def _close(connections: Iterable[socket.socket]) -> None:
    for connection in connections:
        connection.close()


def _listen(port: int, count: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, backlog=count, dualstack_ipv6=both)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise InputError(f"port {port} of process 0: {reason}") from error


def _note(
    connection: socket.socket, count: int, here: dict[int, socket.socket]
) -> InputError | None:
    """Adds whoever connected to those that are here; returns what is wrong with it."""
    said = _read_line(connection, _LINE_S)
    try:
        index, their_count = json.loads(said)["process"]
    except (ValueError, KeyError, TypeError):
        connection.close()  # a stranger
        return None
    twice = index == 0 or (index in here and not _is_gone(here[index]))
    if index in here:
        here.pop(index).close()
    here[index] = connection
    if their_count != count:
        return InputError(f"{_COUNT}: process {index} says {their_count}, process 0 says {count}")
    if twice:
        return InputError(f"{_INDEX}: two of {count} processes are number {index}")
    return None


def _is_gone(connection: socket.socket) -> bool:
    """Whether the other end was closed, as by a process that died and came again."""
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.setblocking(True)


def _say_here(address: str, count: int, index: int, seconds: float) -> None:
    """The part of all others: they call until process 0 answers."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    reason = "it hung up"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), min(left, _LINE_S)) as to:
                to.sendall(json.dumps({"process": [index, count]}).encode() + b"\n")
                # It may have begun to wait later than this process did.
                answer = _read_line(to, 2 * seconds)
        except OSError as error:
            answer, reason = "", error.strerror or str(error)
        if answer:
            said = json.loads(answer)
            if said["problem"] is not None:
                raise (ProcessLost if said["lost"] else InputError)(said["problem"])
            return
        time.sleep(_RETRY_S)
    raise ProcessLost(
        f"process 0 of {count} did not answer at {address} in {seconds:g} s ({reason})"
    )


def _read_line(connection: socket.socket, seconds: float) -> str:
    """A line, or nothing if none comes."""
    connection.settimeout(seconds)
    try:
        with connection.makefile("r") as lines:
            return lines.readline(1000)
    except (OSError, UnicodeDecodeError):
        return ""


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise InputError(f"{name}: {text!r} is no number, and {_ADDRESS} is set")
    return int(text)
