"""Several processes write one store, and it is the store that one process writes."""

import json
import os
import pathlib
import sys
import time

import numpy as np
import pytest

from distill_jax import parallel, teachers

from . import several
from .test_writer import contents

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]


def start(directory, count, *arguments):
    directory.mkdir()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        command = [sys.executable, "-m", "teachers.several", str(directory), *arguments]
        return parallel.start_local(command, count, devices=4 // count)


def results(directory, count):
    return [json.loads((directory / f"result-{i}.json").read_text()) for i in range(count)]


def twice(*shards):
    """Each shard once for both stores."""
    return [shard for shard in shards for _ in several.SCHEMES]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What this process writes with four of its devices."""
    directory = tmp_path_factory.mktemp("alone")
    return {"directory": directory, "figures": several.write(directory)}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes leave that are killed while they write a second time."""
    directory = tmp_path_factory.mktemp("two") / "stores"
    with start(directory, 2, "everything") as running:
        deadline = time.monotonic() + 200
        while not list(directory.glob("killed/*/*array_record-00003-of-*")):
            ended = any(process.poll() is not None for process in running.processes)
            if ended or time.monotonic() > deadline:
                pytest.fail("\n".join(run.stderr[-3000:] for run in running.wait(1)))
            time.sleep(0.01)
    return directory


def test_two_processes_write_the_bytes_of_one(two, alone):
    """All have four devices and two rows on each, so that XLA adds in the same order."""
    assert contents(two / "whole") == contents(alone["directory"])
    found = results(two, 2)
    assert [result["figures"] for result in found] == [alone["figures"]] * 2
    assert [result["shards"] for result in found] == [twice(0, 2, 4, 6), twice(1, 3, 5, 7)]


def test_four_processes_write_the_bytes_of_one(tmp_path, alone):
    with start(tmp_path / "four", 4) as running:
        for run in running.wait(200):
            assert run.returncode == 0, run.stderr[-3000:]
    assert contents(tmp_path / "four" / "whole") == contents(alone["directory"])
    found = results(tmp_path / "four", 4)
    assert [result["figures"] for result in found] == [alone["figures"]] * 4
    assert [result["shards"] for result in found] == [twice(i, i + 4) for i in range(4)]


def test_a_failed_writer_fails_all_and_names_its_process(two, alone):
    first, second = (result["failure"] for result in results(two, 2))
    assert second == "OSError: no space left on device"
    assert first == "ProcessError: process 1 of 2 failed: no space left on device"
    assert contents(two / "failed") == contents(alone["directory"])


def test_killed_processes_leave_what_one_can_finish(two, alone):
    place = two / "killed"
    assert not list(place.rglob("store.json"))
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*array_record-0000[01]*")}
    assert before
    several.write(place)
    assert contents(place) == contents(alone["directory"])
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("kind", ["vocabulary", "times"])
def test_rows_that_processes_share_have_the_same_targets(two, alone, kind):
    """Both processes then hold every row, and each writes half of the shards."""
    halves = [result[f"shards of shared {kind}"] for result in results(two, 2)]
    assert halves == [twice(0, 2, 4, 6), twice(1, 3, 5, 7)]
    for name in several.SCHEMES:
        expected, found = (
            teachers.open_store(directory / name) for directory in (alone["directory"], two / kind)
        )
        assert found.identity == expected.identity
        same = []
        for row in range(len(expected)):
            own, other = expected[row]["targets"], found[row]["targets"]
            width = min(own["ids"].shape[1], other["ids"].shape[1])
            same.append((own["ids"][:, :width] == other["ids"][:, :width]).all(axis=-1))
        # Sums over the vocabulary in another order may flip a sample that was a close call.
        assert np.concatenate(same).mean() > 0.98
