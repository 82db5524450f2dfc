"""Training by several processes: told to stop, taken up by others, and deserted."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import sys

import numpy as np
import pytest
from etils import epath

from distill_jax import parallel
from distill_jax.training import account, read_metrics, read_sessions

from . import several

pytestmark = pytest.mark.slow
HERE = pathlib.Path(__file__).parent


@contextlib.contextmanager
def running(directory, role):
    """Two processes of two devices each, in that role."""
    environment = pytest.MonkeyPatch()
    paths = (HERE.parents[1], HERE.parent, HERE.parent / "without_torch")
    environment.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
    environment.setenv("DISTILL_JAX_WAIT_S", "20")
    command = [sys.executable, "-m", "training.several", str(directory), role]
    with parallel.start_local(command, 2, devices=2) as processes:
        environment.undo()
        yield processes


def run_two(directory, role):
    """What became of two processes in that role, which they played to its end."""
    with running(directory, role) as processes:
        ended = processes.wait(150)
    assert [one.returncode for one in ended] == [0, 0], "".join(one.stderr for one in ended)
    return [json.loads(one.stdout.splitlines()[-1]) for one in ended]


def lines(directory):
    found = read_metrics(directory / "metrics.jsonl")
    assert [line["step"] for line in found] == list(range(1, len(found) + 1))
    return found


def assert_same_losses(directory, expected):
    actual, expected = ([line["loss"] for line in lines(one)] for one in (directory, expected))
    assert len(actual) == several.TRAIN.steps
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=0)


@pytest.fixture(scope="module")
def cycled(tmp_path_factory):
    """Where runs are, and what the two processes said.

    "whole" was undisturbed in this process with eight devices, "two" in two processes; "cycle" was
    stopped in two, in this one with eight, four and eight devices, and ended in two; "again" was
    stopped in two and ended there. "model" is of a language model in this process, "model-two" in
    two whose devices all share rows; "live" and "live-two" are of one with a live teacher, and of
    both models each device has a share.
    """
    place = tmp_path_factory.mktemp("several")
    several.run(place / "whole")
    several.run(place / "model")
    several.run(place / "live", mesh=several.SHARES)
    said = run_two(place, "begin")
    shutil.copytree(place / "cycle", place / "again")
    stops = [
        several.stopped(place / "cycle", devices=count, disturbed=(number, several.told))
        for count, number in ((8, 3), (4, 2), (8, 2))
    ]
    return place, stops, said + run_two(place, "end")


def test_processes_agree_where_to_stop_though_one_alone_was_told(cycled):
    _, stops, (first, second, *_) = cycled
    assert 4 <= first["stopped"] == second["stopped"] <= 5
    start = first["stopped"]
    assert stops == [start + 3, start + 5, start + 7]


def test_any_number_of_devices_and_processes_goes_on_with_the_same_losses(cycled):
    place = cycled[0]
    for name, expected in (
        ("two", "whole"),
        ("cycle", "whole"),
        ("model-two", "model"),
        ("live-two", "live"),
    ):
        assert_same_losses(place / name, place / expected)


def test_two_processes_write_what_one_writes(cycled):
    _, _, (first, second, *_) = cycled
    assert first["texts"] == second["texts"] == several.texts()


def test_as_many_processes_end_with_the_same_bits(cycled):
    place, _, said = cycled
    assert len({one["digest"] for one in said}) == 1
    assert lines(place / "again") == lines(place / "two")


def test_sessions_are_accounted_for_without_a_gap(cycled):
    place, stops, (first, *_) = cycled
    sessions = read_sessions(epath.Path(place / "cycle"))
    ends = [first["stopped"], *stops, several.TRAIN.steps]
    assert [session["last"] for session in sessions] == ends
    assert [session["first"] for session in sessions] == [0, *ends[:-1]]
    found = account(sessions)
    assert found["seconds"]["recomputed"] == 0 < found["seconds"]["down"]
    assert found["seconds"]["compile"] > 0 < found["seconds"]["checkpoint"]


def test_a_process_that_hangs_or_died_is_named_by_all_others(tmp_path):
    with running(tmp_path, "hang") as hanging, running(tmp_path, "die") as dying:
        first, second = dying.wait(150)
        assert second.returncode == -signal.SIGKILL
        assert first.returncode == parallel.EXIT_AGAIN, first.stderr
        assert "error: process 1 of 2 is lost, silent for 2" in first.stderr
        assert "; it was at step " in first.stderr
        for one in hanging.wait(150):
            assert one.returncode == parallel.EXIT_AGAIN, one.stderr
            assert "error: process 1 of 2 is stuck at step 3 (data) for 20 s" in one.stderr
