"""Who takes part in a job, and what is said of whoever does not come."""

import concurrent.futures
import contextlib
import json
import os
import socket
import time

import jax
import pytest
from jax._src.clusters import cloud_tpu_cluster

from distill_jax import parallel
from distill_jax.artifacts import InputError
from distill_jax.parallel import startup
from distill_jax.parallel.startup import call_roll

# JAX splits names of hosts in a way that Python 3.13 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:'maxsplit' is passed:DeprecationWarning")


@pytest.fixture
def address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def call(address, roll, seconds=20.0):
    """What the roll call tells each of the (index, count) that come; None if all is well."""

    def one(place):
        index, count = place
        try:
            return call_roll(address, count, index, seconds)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    with concurrent.futures.ThreadPoolExecutor(len(roll)) as pool:
        return list(pool.map(one, roll))


def test_all_come_and_leave_the_port_free(address):
    for _ in range(2):
        assert call(address, [(2, 3), (0, 3), (1, 3)]) == [None] * 3
    assert call(address, [(0, 1)]) == [None]


def test_all_hear_who_is_missing(address):
    missing = "ProcessLost: process 2, 3 of 4 did not start in 0.5 s"
    assert call(address, [(0, 4), (1, 4)], 0.5) == [missing] * 2


def test_a_first_process_that_is_missing_is_named_with_its_address(address):
    (said,) = call(address, [(1, 2)], 0.5)
    assert said.startswith(f"ProcessLost: process 0 of 2 did not answer at {address} in 0.5 s (")


def test_processes_that_contradict_each_other_are_refused(address):
    other = "InputError: JAX_NUM_PROCESSES: process 3 says 4, process 0 says 2"
    assert call(address, [(0, 2), (3, 4)]) == [other] * 2
    twice = "InputError: JAX_PROCESS_ID: two of 3 processes are number 1"
    said = call(address, [(0, 3), (1, 3), (1, 3)], 1.0)
    assert said.count(twice) >= 2


def test_strangers_and_those_who_come_again_do_no_harm(address):
    port = int(address.rpartition(":")[2])

    def connect(text):
        for _ in range(500):
            time.sleep(0.02)
            with contextlib.suppress(ConnectionRefusedError):
                with socket.create_connection(("localhost", port), 5) as connection:
                    connection.sendall(text)
                return
        raise AssertionError("nobody listens")

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(call, address, [(0, 3)])
        for text in (b"GET / HTTP/1.1\r\n\r\n", b"\xff\n", b"3\n"):
            connect(text)
        # It dies while another is still missing; with all there the roll would be over.
        connect(json.dumps({"process": [1, 3]}).encode() + b"\n")
        assert call(address, [(1, 3), (2, 3)]) == [None, None]
        assert first.result() == [None]


def test_a_port_that_is_taken_is_named(address):
    port = int(address.rpartition(":")[2])
    with startup._listen(port, 1):
        (said,) = call(address, [(0, 2)])
    assert said == f"InputError: port {port} of process 0: Address already in use"


SLURM = {
    "SLURM_JOB_ID": "1000",
    "SLURM_STEP_NODELIST": "node[007,009-010]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_NODES": "4",
}
GKE = {"TPU_WORKER_HOSTNAMES": "localhost,other", "TPU_WORKER_ID": "1"}
MULTISLICE = {
    "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
    "MEGASCALE_NUM_SLICES": "3",
    "MEGASCALE_SLICE_ID": "2",
}
OVERRIDE = {
    "JAX_COORDINATOR_ADDRESS": "elsewhere:1",
    "JAX_NUM_PROCESSES": "9",
    "JAX_PROCESS_ID": "8",
}
# What the metadata server of a Cloud TPU VM knows.
METADATA = {
    "agent-worker-number": "1",
    "worker-network-endpoints": "unknown:unknown:127.0.0.1,unknown:unknown:127.0.0.2",
    "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-16'\nWORKER_ID: '1'",
}


def joined(monkeypatch, environment, *, tpu=False):
    """The (address, count, index) with which the roll is called and JAX started."""
    calls = []
    for name in list(os.environ):
        if name.startswith(("SLURM_", "JAX_COORD", "MEGASCALE", "TPU_")):
            monkeypatch.delenv(name)
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", tpu)
    known = {} if "TPU_WORKER_ID" in environment else METADATA
    monkeypatch.setattr(
        cloud_tpu_cluster,
        "get_metadata",
        lambda key: (known.get(key, ""), 200 if key in known else 404),
    )
    monkeypatch.setattr(startup, "call_roll", lambda *place: calls.append(place[:3]))
    monkeypatch.setattr(startup.watch, "start", lambda: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *place, **_: calls.append(place))
    parallel.start()
    assert calls[:1] == calls[1:]
    return calls[0] if calls else None


@pytest.mark.parametrize(
    ("environment", "tpu", "place"),
    [
        ({}, False, None),
        (SLURM, False, ("node007:62440", 4, 2)),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, False, None),
        (SLURM | {"JAX_COORDINATOR_PORT": "77"}, False, ("node007:77", 4, 2)),
        (GKE, True, ("localhost:8482", 2, 1)),
        (GKE | {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, True, None),
        (GKE | MULTISLICE, True, ("localhost:8482", 6, 5)),
        ({}, True, ("127.0.0.1:8482", 2, 1)),
        (GKE | OVERRIDE, True, ("elsewhere:1", 9, 8)),
    ],
    ids=["none", "slurm", "slurm-1", "port", "gke", "gke-1", "multislice", "tpu-vm", "override"],
)
def test_clusters_need_no_flags(monkeypatch, environment, tpu, place):
    assert joined(monkeypatch, environment, tpu=tpu) == place


def test_a_first_host_without_a_name_is_named(monkeypatch):
    def unknown(name):
        raise socket.gaierror(name)

    monkeypatch.setenv("DISTILL_JAX_WAIT_S", "0.1")
    monkeypatch.setattr(cloud_tpu_cluster.time, "sleep", lambda _: None)
    monkeypatch.setattr(cloud_tpu_cluster.socket, "gethostbyname", unknown)
    nowhere = GKE | {"TPU_WORKER_HOSTNAMES": "no-such-host.invalid,other"}
    with pytest.raises(parallel.ProcessLost, match=r"process 0 did not .*no-such-host\.invalid"):
        joined(monkeypatch, nowhere, tpu=True)


@pytest.mark.parametrize("text", ["soon", "-1", "0", "inf", "nan"])
def test_a_wait_that_is_no_time_is_refused(monkeypatch, text):
    monkeypatch.setenv("DISTILL_JAX_WAIT_S", text)
    with pytest.raises(InputError, match=r"DISTILL_JAX_WAIT_S: '.*' is not a number of seconds"):
        parallel.start()
