import dataclasses
import json
import os
import signal

import pytest
from etils import epath

from distill_jax import parallel, pipeline
from distill_jax.artifacts import InputError
from distill_jax.pipeline import Stage


class Killed(Exception):
    """Stands for the end of the process."""


def make_stages(log, *, factor=2, fail=()):
    def first(place):
        log.append("first")
        (place / "value").write_text("3")
        if "first" in fail:
            raise Killed
        return {"value": 3}

    def second(place):
        log.append("second")
        value = int((place.parent / "first" / "value").read_text()) * factor
        (place / "value").write_text(str(value))
        return {"value": value}

    return [
        Stage(name="first", command="one", recipe={"size": 3}, inputs=(), work=first),
        Stage(
            name="second", command="two", recipe={"factor": factor}, inputs=("first",), work=second
        ),
    ]


def test_runs_in_order_and_skips_what_is_done(tmp_path):
    place, log = epath.Path(tmp_path), []
    assert pipeline.run(make_stages(log), place) == {"first": {"value": 3}, "second": {"value": 6}}
    assert pipeline.run(make_stages(log), place)["second"] == {"value": 6}
    assert log == ["first", "second"]
    manifest = json.loads((tmp_path / "second" / "manifest.json").read_text())
    assert manifest["recipe"] == {"factor": 2}
    assert manifest["inputs"].keys() == {"first"}
    assert manifest["versions"]["jax"]


def test_goes_on_after_a_kill(tmp_path):
    place, log = epath.Path(tmp_path), []
    with pytest.raises(Killed):
        pipeline.run(make_stages(log, fail={"first"}), place)
    assert not (tmp_path / "first" / "manifest.json").exists()
    pipeline.run(make_stages(log), place)
    assert log == ["first", "first", "second"]


def test_another_recipe_is_refused_with_the_difference_and_nothing_is_lost(tmp_path):
    place, log = epath.Path(tmp_path), []
    pipeline.run(make_stages(log), place)
    with pytest.raises(InputError, match=r"second holds .* \(recipe\.factor: 2 -> 5\); use --over"):
        pipeline.run(make_stages(log, factor=5), place)
    assert (tmp_path / "second" / "value").read_text() == "6"
    found = pipeline.run(make_stages(log, factor=5), place, overwrite=True)
    assert found["second"] == {"value": 15}
    assert log == ["first", "second", "second"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "first", "second"]


def test_work_begun_for_another_recipe_is_refused_too(tmp_path):
    place, log = epath.Path(tmp_path), []
    with pytest.raises(Killed):
        pipeline.run(make_stages(log, fail={"first"}), place)
    changed = make_stages(log)
    changed[0] = Stage(
        name="first", command="one", recipe={"size": 4}, inputs=(), work=changed[0].work
    )
    with pytest.raises(InputError, match=r"recipe\.size: 3 -> 4"):
        pipeline.run(changed, place)


def test_a_changed_input_makes_what_reads_it_unfit(tmp_path):
    place, log = epath.Path(tmp_path), []
    pipeline.run(make_stages(log), place)
    changed = make_stages(log)
    changed[0] = Stage(
        name="first", command="one", recipe={"size": 4}, inputs=(), work=changed[0].work
    )
    pipeline.run(changed, place, command="one", overwrite=True)
    with pytest.raises(InputError, match=r"inputs\.first: "):
        pipeline.run(changed, place)


def test_a_stage_alone_needs_what_it_reads(tmp_path):
    place, log = epath.Path(tmp_path), []
    with pytest.raises(InputError, match="run the stage 'one' before 'two'"):
        pipeline.run(make_stages(log), place, command="two")
    pipeline.run(make_stages(log), place, command="one")
    assert pipeline.run(make_stages(log), place, command="two") == {"second": {"value": 6}}
    assert log == ["first", "second"]


def test_a_stage_alone_refuses_an_input_of_another_recipe(tmp_path):
    place, log = epath.Path(tmp_path), []
    pipeline.run(make_stages(log), place)
    changed = make_stages(log)
    changed[0] = Stage(
        name="first", command="one", recipe={"size": 99}, inputs=(), work=changed[0].work
    )
    with pytest.raises(InputError, match=r"recipe\.size: 3 -> 99"):
        pipeline.run(changed, place, command="two")


def test_what_is_not_ours_is_left_alone(tmp_path):
    place, log = epath.Path(tmp_path), []
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"thesis\.tex: is in the way"):
            pipeline.run(make_stages(log), place, overwrite=overwrite)
    (tmp_path / "first" / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="not written by this program"):
        pipeline.run(make_stages(log), place)
    assert (tmp_path / "first" / "thesis.tex").exists()
    assert log == []


def test_two_runs_in_one_directory_are_refused(tmp_path):
    place, log = epath.Path(tmp_path), []
    stages = make_stages(log)
    inner = dataclasses.replace(
        stages[0], work=lambda _: pipeline.run(make_stages(log), place)["first"]
    )
    with pytest.raises(InputError, match="another run is at work there"):
        pipeline.run([inner], place)


def test_an_input_of_another_recipe_is_to_be_made_again_first(tmp_path):
    place, log = epath.Path(tmp_path), []
    pipeline.run(make_stages(log), place)
    stages = make_stages(log)
    stages[0] = dataclasses.replace(stages[0], recipe={"size": 4})
    with pytest.raises(InputError, match=r"size: 3 -> 4.*run 'one' with --overwrite before 'two'"):
        pipeline.run(stages, place, command="two", overwrite=True)


def test_a_command_without_stages_is_refused(tmp_path):
    with pytest.raises(InputError, match="the recipe has no stage 'three'"):
        pipeline.run(make_stages([]), epath.Path(tmp_path), command="three")


def test_told_to_stop_it_ends_what_cannot_be_interrupted_and_begins_nothing(tmp_path):
    place, log = epath.Path(tmp_path), []
    first, second = make_stages(log)

    def told(directory):
        with parallel.deferring():
            os.kill(os.getpid(), signal.SIGTERM)
            return first.work(directory)

    with pytest.raises(parallel.Preempted, match="stopped before second"), parallel.stoppable():
        pipeline.run([dataclasses.replace(first, work=told), second], place)
    assert log == ["first"]
    assert pipeline.read_manifest(place / "first")["figures"] == {"value": 3}
