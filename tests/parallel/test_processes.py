"""What processes say to each other, without any device."""

import json
import os
import pathlib
import sys

import jax
import pytest
from etils import epath

from distill_jax import parallel, pipeline, progress
from distill_jax.artifacts import InputError

ROOT = pathlib.Path(__file__).parents[2]


def attempt(work):
    """What `work` returns, or the line of its exception."""
    try:
        return work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def fails_on(process, message="too bad,\n  really"):
    def work():
        with parallel.together(), parallel.together():
            if parallel.index() == process:
                raise InputError(message)
            parallel.gather()

    return attempt(work)


def only_on(process, result):
    assert parallel.index() == process
    return result


def run_stage(directory, name, work):
    place = epath.Path(directory)
    stage = pipeline.Stage(name=name, command=name, recipe={}, inputs=(), work=work)
    return attempt(lambda: pipeline.run([stage], place))


def fill(place):
    """The work of a stage: a file of each process's."""
    assert (place / "started.json").exists()
    (place / str(parallel.index())).write_text("here")
    return {"process": parallel.index()}


def everything(directory):
    """One process's part; returns what it saw."""
    parallel.start()
    parallel.start()
    index = parallel.index()
    seen = {
        "gather": [parallel.gather(index * 10 + turn) for turn in range(3)],
        "main": parallel.on_main(lambda: only_on(0, {"a": [1]}), what="a test"),
        "failure": [fails_on(1), fails_on(0)],
        "failed main": attempt(lambda: parallel.on_main(lambda: 1 // 0, what="a test")),
        "stage": [run_stage(directory, "one", fill) for _ in range(2)],
        "stage in the way": run_stage(directory, "foreign", fill),
    }
    progress._PLAIN_INTERVAL_S = 0
    with progress.bar("shown", 2) as bar:
        bar.advance()
    if index == 1:
        # Without a word the other has to give up, and then this one too, too late.
        while not (pathlib.Path(directory) / "gave up").exists():
            pass
    seen["late"] = attempt(lambda: parallel.barrier("the meeting", seconds=1))
    (pathlib.Path(directory) / "gave up").touch()
    return seen


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each of two processes saw, and their directory."""
    directory = tmp_path_factory.mktemp("two")
    (directory / "foreign").mkdir()
    (directory / "foreign" / "thesis.tex").touch()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'parallel'}")
        code = "import json, sys, test_processes as t; print(json.dumps(t.everything(sys.argv[1])))"
        with parallel.start_local([sys.executable, "-c", code, str(directory)], 2) as running:
            runs = running.wait(120)
    assert [run.returncode for run in runs] == [0, 0], "".join(run.stderr for run in runs)
    return [json.loads(run.stdout) for run in runs], directory, [run.stderr for run in runs]


def test_all_hear_what_each_says(seen):
    for process in seen[0]:
        assert process["gather"] == [[0, 10], [1, 11], [2, 12]]
        assert process["main"] == {"a": [1]}


def test_a_failure_ends_the_block_on_all_and_is_told_by_name(seen):
    (first, second), _, _ = seen
    own = "InputError: too bad,\n  really"
    assert first["failure"] == ["ProcessError: process 1 of 2 failed: too bad, really", own]
    assert second["failure"] == [own, "ProcessError: process 0 of 2 failed: too bad, really"]
    assert first["failed main"].startswith("ZeroDivisionError")
    assert second["failed main"].startswith("ProcessError: process 0 of 2 failed: integer div")


def test_whoever_does_not_come_is_named(seen):
    (first, second), _, _ = seen
    assert first["late"] == "ProcessLost: process 1 of 2 did not reach the meeting in 1 s"
    assert second["late"].startswith("ProcessLost: this process 1 of 2 did not reach the meeting")


def test_a_stage_is_claimed_and_committed_by_the_first(seen):
    (first, second), directory, errors = seen
    assert first["stage"] == second["stage"] == [{"one": {"process": 0}}] * 2
    assert {path.name for path in (directory / "one").iterdir()} == {"manifest.json", "0", "1"}
    assert "thesis.tex: is in the way" in first["stage in the way"]
    assert first["stage in the way"] in second["stage in the way"].replace(
        "ProcessError: process 0 of 2 failed", "InputError"
    )
    assert "one: starting\none: done in" in errors[0]
    assert "one: " not in errors[1]


def test_the_first_alone_shows_progress(seen):
    first, second = seen[2]
    assert "shown: 1/2 steps" in first
    assert "shown" not in second


def test_one_process_needs_no_one(monkeypatch):
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    parallel.start()
    assert parallel.gather({"a": 1}) == [{"a": 1}]
    assert parallel.on_main(lambda: 3, what="nothing") == 3
    assert parallel.is_main()
    with pytest.raises(ValueError, match="mine"), parallel.together():
        raise ValueError("mine")


@pytest.mark.parametrize(
    ("address", "process", "message"),
    [("localhost", "0", "'localhost' is not host:port"), ("localhost:1", "2", "2 is not below")],
)
def test_a_place_that_cannot_be_is_refused(monkeypatch, address, process, message):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", address)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", process)
    with pytest.raises(InputError, match=message):
        parallel.start()


@pytest.mark.parametrize("missing", ["JAX_NUM_PROCESSES", "JAX_PROCESS_ID"])
def test_an_address_alone_is_refused(monkeypatch, missing):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "x")
    if missing == "JAX_NUM_PROCESSES":
        monkeypatch.delenv(missing)
    with pytest.raises(InputError, match=f"{missing}: '.*' is no number, and JAX_COORD"):
        parallel.start()


def test_devices_made_of_fewer_cores_have_threads_for_all_and_more(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.delenv("NPROC")
    parallel.start()
    assert int(os.environ["NPROC"]) > jax.config.values["jax_num_cpu_devices"] == 8
    monkeypatch.setenv("NPROC", "9")
    parallel.start()
    assert os.environ["NPROC"] == "9"
