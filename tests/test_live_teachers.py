"""A recipe whose teachers run beside the student, by the stages that a run has."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np
import pytest
import scipy.special
from etils import epath
from training.test_loop import Dying, Killed

from distill_jax import artifacts, data, models, pipeline
from distill_jax.artifacts import InputError
from distill_jax.recipe import TargetsConfig, load_recipe
from distill_jax.stages import Run, all_stages, preflight
from distill_jax.teachers import WriteConfig
from distill_jax.training import read_metrics

TINY = pathlib.Path(__file__).parents[1] / "configs" / "tiny.py"
TEMPERATURE = 2.0
STUDENT = "distill/seed-0"
OVERRIDES = (
    "size=test",
    "distill.terms.large.live=true",
    "distill.terms.large.divergence=reverse_kl",
    f"targets.temperature={TEMPERATURE}",
    "distill.train.steps=4",
    "distill.train.checkpoint_every=2",
    "controls=[]",
)


def stages(run):
    return {stage.name: stage for stage in all_stages(run)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A text, two teachers and a pruned student that nobody trained, and one teacher's targets."""
    made = Run(load_recipe(TINY, OVERRIDES), epath.Path(tmp_path_factory.mktemp("run")))
    stages(made)["corpus"].work(made.directory / "corpus")
    shapes = {f"teachers/{name}": one.shape for name, one in made.recipe.teachers.items()}
    shapes["prune"] = made.recipe.prune.target
    for seed, (stage, shape) in enumerate(shapes.items()):
        shape = dataclasses.replace(shape, vocab_size=made.tokenizer.vocab_size)
        params = models.init_params(shape, jax.random.key(seed))
        wild = jax.tree.map(lambda x: 4 * x, params)  # so that they do not agree
        made.save(made.directory / stage, models.Model(shape, wild))
    place = made.directory / "targets/small"
    figures = stages(made)["targets/small"].work(place)
    artifacts.write_json(place / pipeline.MANIFEST, {"figures": figures})
    return made


@pytest.fixture(scope="module")
def whole(run):
    """The metrics of an undisturbed training, in the directory "whole"."""
    figures = stages(run)[STUDENT].work(run.directory / "whole")
    assert figures["steps"] == 4
    return read_metrics(run.directory / "whole" / "metrics.jsonl")


@pytest.mark.slow
def test_a_live_teacher_is_read_where_a_store_would_be(run):
    found = stages(run)
    assert [name for name in found if name.startswith("targets/")] == ["targets/small"]
    inputs = ("corpus", "prune", "targets/small", "teachers/large")
    assert tuple(found[STUDENT].inputs) == inputs


@pytest.mark.slow
def test_the_first_loss_is_the_definition_and_a_killed_training_ends_with_the_same_bits(
    run, whole, monkeypatch
):
    work = stages(run)[STUDENT].work
    batch = next(data.batches(run.corpus("train"), batch_rows=8, seed=0))
    student, teacher = (models.load(run.directory / stage) for stage in ("prune", "teachers/large"))
    log_q, log_p = (
        scipy.special.log_softmax(
            np.asarray(
                models.logits(one.config, one.params, batch["tokens"], batch["segment_ids"]),
                np.float64,
            )
            / TEMPERATURE,
            axis=-1,
        )
        for one in (student, teacher)
    )
    reverse = TEMPERATURE**2 * np.sum(np.exp(log_q) * (log_q - log_p), axis=-1)
    expected = np.average(reverse, weights=batch["where"])
    assert expected > 0.1
    assert whole[0]["large"] == pytest.approx(expected, rel=1e-4)

    undisturbed = data.batches
    monkeypatch.setattr(data, "batches", lambda *a, **k: Dying(undisturbed(*a, **k), 3))
    with pytest.raises(Killed):
        work(run.directory / "killed")
    monkeypatch.undo()
    work(run.directory / "killed")
    assert read_metrics(run.directory / "killed" / "metrics.jsonl") == whole
    ends = [models.load(run.directory / name).params for name in ("whole", "killed")]
    jax.tree.map(np.testing.assert_array_equal, *ends)


@pytest.mark.slow
def test_a_bfloat16_computation_reads_the_teacher_in_bfloat16(run, whole, monkeypatch):
    loaded = {}
    load = Run.load

    def spied(self, stage, *args):
        loaded[stage] = load(self, stage, *args)
        return loaded[stage]

    monkeypatch.setattr(Run, "load", spied)
    low = load_recipe(
        TINY, [*OVERRIDES, "distill.train.compute_dtype=bfloat16", "distill.train.steps=1"]
    )
    stages(dataclasses.replace(run, recipe=low))[STUDENT].work(run.directory / "low")
    types = {
        stage: {str(leaf.dtype) for leaf in jax.tree.leaves(model.params)}
        for stage, model in loaded.items()
    }
    assert types == {"prune": {"float32"}, "teachers/large": {"bfloat16"}}
    (line,) = read_metrics(run.directory / "low" / "metrics.jsonl")
    assert line["large"] == pytest.approx(whole[0]["large"], rel=0.05)
    assert line["large"] != whole[0]["large"]


@functools.cache
def live_alone():
    """All teachers live; nothing is said of targets."""
    recipe = load_recipe(TINY, ["size=test", "divergence=adaptive_kl"])
    terms = {
        name: dataclasses.replace(term, live=True) for name, term in recipe.distill.terms.items()
    }
    distill = dataclasses.replace(recipe.distill, terms=terms)
    return dataclasses.replace(recipe, distill=distill, targets=TargetsConfig())


def test_where_all_teachers_are_live_nothing_is_stored(tmp_path):
    preflight.check(live_alone())
    names = stages(Run(live_alone(), epath.Path(tmp_path)))
    assert not [name for name in names if name.startswith("targets")]
    assert set(names["report"].inputs) <= names.keys()
    with pytest.raises(InputError, match="the recipe has no stage 'targets'"):
        pipeline.run(list(names.values()), epath.Path(tmp_path), command="targets")


def test_of_targets_that_nobody_stores_only_the_temperature_matters(tmp_path):
    recipes = [
        dataclasses.replace(live_alone(), targets=TargetsConfig(temperature=one)) for one in (1, 2)
    ]
    found = [stages(Run(recipe, epath.Path(tmp_path))) for recipe in recipes]
    for name in (STUDENT, "controls/random_start/seed-0"):
        assert found[0][name].recipe != found[1][name].recipe
    name = "controls/cross_entropy/seed-0"
    assert found[0][name].recipe == found[1][name].recipe
    unused = TargetsConfig(write=WriteConfig(batch_rows=3))  # no share for each of eight devices
    preflight.check(dataclasses.replace(live_alone(), targets=unused))


def test_what_a_live_teacher_cannot_do_is_told():
    with pytest.raises(InputError, match="a live teacher reads no store; leave targets out"):
        load_recipe(TINY, [*OVERRIDES, "distill.terms.large.targets=top_k"])
    wrong = dataclasses.replace(live_alone().distill.terms["large"], options={"head_mass": 1.5})
    terms = {**live_alone().distill.terms, "large": wrong}
    distill = dataclasses.replace(live_alone().distill, terms=terms)
    with pytest.raises(InputError, match=r"distill\.terms: head_mass must be between 0 and 1"):
        preflight.check(dataclasses.replace(live_alone(), distill=distill))
    elsewhere = dataclasses.replace(live_alone().teachers["large"], shape=None, source="nowhere")
    teachers = {**live_alone().teachers, "large": elsewhere}
    with pytest.raises(InputError, match="nowhere: no such file"):
        preflight.check(dataclasses.replace(live_alone(), teachers=teachers))
