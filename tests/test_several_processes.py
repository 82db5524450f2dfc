"""Stages that several processes run together, and targets of a corpus that grew."""

import json
import os
import pathlib
import re
import shutil
import signal
import sys
import time

import jax
import numpy as np
import pytest

from distill_jax import cli, models, parallel, pruning

pytestmark = pytest.mark.slow
TINY = pathlib.Path(__file__).parent.parent / "configs" / "tiny.py"
# One teacher, random, which needs no training. Its parameters are whole on every device, for
# sums of parts of them are rounded in the order in which processes send their parts.
CONFIG = f"""
import dataclasses, runpy
from distill_jax.parallel import MeshConfig

def get_config():
    recipe = runpy.run_path({str(TINY)!r})["get_config"](size="test")
    large = dataclasses.replace(recipe.teachers["large"], train=None)
    terms = {{"large": recipe.distill.terms["large"]}}
    distill = dataclasses.replace(recipe.distill, terms=terms)
    mesh = MeshConfig(data=8, fsdp=1)
    return dataclasses.replace(recipe, teachers={{"large": large}}, distill=distill, mesh=mesh)
"""


@pytest.fixture(scope="module", autouse=True)
def without_torch():
    """What the processes of a pod have."""
    with pytest.MonkeyPatch.context() as environment:
        paths = (TINY.parents[1], pathlib.Path(__file__).parent / "without_torch")
        environment.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    place = tmp_path_factory.mktemp("config") / "one_teacher.py"
    place.write_text(CONFIG)
    return place


def command(stage, config, out, *sets):
    arguments = [stage, str(config), "--out", str(out), "--json"]
    return arguments + [argument for text in sets for argument in ("--set", text)]


def stores(out):
    files = [path for path in out.glob("targets/*/*/*") if path.is_file()]
    assert len(files) == 2 * (3 + 5)
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, config):
    """A run whose targets this process stored with its eight devices."""
    out = tmp_path_factory.mktemp("alone")
    for stage in ("corpus", "teachers", "targets"):
        assert cli.main(command(stage, config, out)) == 0
    return out


def figures(out):
    return json.loads((out / "targets" / "large" / "manifest.json").read_text())["figures"]


def test_two_processes_stop_as_one_is_told_and_then_store_what_one_stores(alone, config, tmp_path):
    """Eight devices and one row on each in both."""
    two = tmp_path / "two"
    shutil.copytree(alone, two, ignore=shutil.ignore_patterns("targets"))

    def program(stage):
        return [sys.executable, "-m", "distill_jax.cli", *command(stage, config, two)]

    with parallel.start_local(program("run"), 2, devices=4) as running:
        while not next(two.glob("targets/*/started.json"), None):
            assert running.processes[0].poll() is None
            time.sleep(0.05)
        running.processes[1].send_signal(signal.SIGTERM)
        ended = running.wait(240)
    assert [one.returncode for one in ended] == [parallel.EXIT_AGAIN] * 2, ended[0].stderr
    # Told at the start of a stage they may be at the end of it before all have heard.
    assert re.search("stopped (while targets were written|before prune); the same", ended[0].stderr)
    with parallel.start_local(program("targets"), 2, devices=4) as running:
        first, second = running.wait(240)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    # Gloo, too, writes to standard output.
    last = json.loads(first.stdout.splitlines()[-1])
    assert last["stages"].keys() == {"targets/large"}
    assert "stages" not in second.stdout
    assert "targets/large: done in" in first.stderr
    assert "targets/" not in second.stderr
    assert stores(two) == stores(alone)
    assert figures(two) == figures(alone)
    assert not list(two.rglob("started.json"))


def test_two_processes_prune_as_one_does(alone, config, tmp_path):
    """Rows, parameters, statistics and fits lie across both."""
    sets = "mesh.data=1", "mesh.fsdp=-1", "prune.layer_choice=perplexity"
    for name in ("one", "two"):
        shutil.copytree(alone, tmp_path / name, ignore=shutil.ignore_patterns("targets"))
    one, two = tmp_path / "one" / "prune", tmp_path / "two" / "prune"
    assert cli.main(command("prune", config, one.parent, *sets)) == 0
    arguments = command("prune", config, two.parent, *sets)
    program = [sys.executable, "-m", "distill_jax.cli", *arguments]
    with parallel.start_local(program, 2, devices=2) as running:
        first, second = running.wait(240)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    plans = [pruning.Plan.load(place / "plan.json").to_json() for place in (one, two)]
    assert plans[0]["kept"] == plans[1]["kept"]
    for measure in (score_arrays, model_arrays):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4),
            *map(measure, (one, two)),
        )


def score_arrays(place):
    scores = pruning.Scores.load(place / "scores.safetensors")
    return {name: x for name, x in vars(scores).items() if isinstance(x, np.ndarray)}


def model_arrays(place):
    return models.load(place).params


def test_a_corpus_that_grew_reuses_the_targets_of_what_it_was(alone, config, tmp_path, capsys):
    old, new = tmp_path / "old", tmp_path / "new"
    for stage in ("corpus", "teachers", "targets"):
        assert cli.main(command(stage, config, old, "corpus.train_rows=32")) == 0
    shutil.copytree(alone, new, ignore=shutil.ignore_patterns("targets"))
    reuse = f"targets.reuse={old}"
    assert cli.main(command("targets", config, new, reuse)) == 0
    assert stores(new) == stores(alone)
    found = {name: of_store["reused"] for name, of_store in figures(new).items()}
    assert found == {"top_k": 32, "samples": 32}
    # Without it the result is the same, and so is the stage's identity.
    assert cli.main(command("targets", config, new)) == 0
    capsys.readouterr()
    for place, message in (
        (new, "own directory, where targets are written anew"),
        (tmp_path, "has no finished store of the recipe's teachers"),
        (tmp_path / "nowhere", "no such file or directory"),
    ):
        assert cli.main(command("targets", config, new, f"targets.reuse={place}")) == 2
        assert message in capsys.readouterr().err
