"""Teachers that read every batch beside the student, inside of the step."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn_params

from distill_jax import losses, models, parallel
from distill_jax.artifacts import InputError
from distill_jax.losses import chunks
from distill_jax.training import (
    TrainConfig,
    jit_step,
    language_model_loss,
    read_metrics,
    train,
)
from distill_jax.training.step import sum_gradients

V, ROWS, TIME, TEMPERATURE = 32, 8, 12, 1.5
STUDENT = models.LlamaConfig(
    vocab_size=V, embed=16, mlp=24, layers=2, heads=4, kv_heads=2, head_dim=4, tied=True
)
SHAPES = {
    # Its channels are split over fewer devices than the student's.
    "large": models.LlamaConfig(
        vocab_size=V, embed=18, mlp=40, layers=3, heads=2, kv_heads=1, head_dim=8, tied=False
    ),
    "small": dataclasses.replace(STUDENT, embed=8, layers=1, heads=2, kv_heads=2),
}
OBJECTIVE = losses.weighted_sum(
    hard=(0.1, losses.hard_labels()),
    large=(0.5, losses.distill("large", losses.reverse_kl, temperature=TEMPERATURE)),
    small=(0.4, losses.distill("small", losses.forward_kl)),
)
MESHES = (
    {"data": 2, "fsdp_minor": 2},
    {"data": 2, "tensor": 2},
    {"sequence": 2, "tensor": 2},
)


def params(config, seed):
    """Larger than at a start, so that models have opinions."""
    return jax.tree.map(lambda x: 4 * x, drawn_params(config, seed))


def teachers():
    return {name: params(shape, seed) for seed, (name, shape) in enumerate(SHAPES.items(), 1)}


def batch():
    rng = np.random.default_rng(0)
    ids = np.ones((ROWS, TIME), np.int32)
    ids[:, 7:] = 2
    return {
        "tokens": rng.integers(0, V, (ROWS, TIME)).astype(np.int32),
        "labels": rng.integers(0, V, (ROWS, TIME)).astype(np.int32),
        "segment_ids": ids,
        "where": (rng.random((ROWS, TIME)) < 0.7).astype(np.float32),
        "row_id": np.arange(ROWS),
    }


@jax.jit
def beforehand(student):
    """The loss by whole logits: of the teachers they are there before."""
    rows = batch()
    all_logits = lambda config, params: models.logits(  # noqa: E731
        config, params, rows["tokens"], rows["segment_ids"]
    ).reshape(-1, V)
    dense = {name: all_logits(SHAPES[name], params) for name, params in teachers().items()}
    targets = {"labels": rows["labels"].reshape(-1), **dense}

    def loss(student):
        per_token = OBJECTIVE(all_logits(STUDENT, student), targets)
        return losses.reduce(*per_token, rows["where"].reshape(-1)).loss

    return jax.value_and_grad(loss)(student)


def placed(config, params, mesh):
    return jax.device_put(params, parallel.shardings(mesh, models.logical_axes(config), params))


def step(mesh, parts=1, **options):
    loss = language_model_loss(STUDENT, OBJECTIVE, live=SHAPES, mesh=mesh, **options)

    def gradient(student, frozen):
        bar, totals = sum_gradients(loss, student, batch(), jnp.int32(0), parts, frozen)
        return totals.loss, bar

    return jax.jit(gradient)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "parts"), [(None, 1), (MESHES[0], 1), (MESHES[1], 2), (MESHES[2], 2)]
)
def test_loss_and_gradient_are_those_of_logits_that_were_there_before(sizes, parts):
    loss, gradient = beforehand(params(STUDENT, 0))
    student, frozen = params(STUDENT, 0), teachers()
    mesh = None
    if sizes is not None:
        mesh = parallel.make_mesh(parallel.MeshConfig(**sizes))
        student = placed(STUDENT, student, mesh)
        frozen = {name: placed(SHAPES[name], tree, mesh) for name, tree in frozen.items()}
    actual = step(mesh, parts, remat="full")(student, frozen)
    np.testing.assert_allclose(actual[0], loss, rtol=1e-5)
    size = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    chex.assert_trees_all_close(actual[1], gradient, rtol=1e-5, atol=1e-5 * size)


@pytest.mark.slow
def test_no_logits_of_all_tokens_are_made(monkeypatch):
    monkeypatch.setattr(chunks, "LEAST_CHUNK", 16)
    monkeypatch.setattr(chunks, "_MOST_CHUNK", 16)
    text = step(None).lower(params(STUDENT, 0), teachers()).as_text()
    assert f"tensor<16x{V}x" in text
    assert not re.search(rf"tensor<(1x)?({ROWS}x{TIME}|{ROWS * TIME})x{V}x", text)


@pytest.mark.slow
def test_of_teachers_no_gradients_are_made():
    mesh = parallel.make_mesh(parallel.MeshConfig(data=2, fsdp_minor=2))
    student = placed(STUDENT, params(STUDENT, 0), mesh)
    frozen = {name: placed(SHAPES[name], tree, mesh) for name, tree in teachers().items()}
    text = step(mesh).lower(student, frozen).compile().as_text()
    scattered = set(re.findall(r"= f32\[(\S*)\]\S* reduce-scatter", text))
    assert scattered  # of the student
    assert not [sizes for sizes in scattered if re.search(r"\b(18|9|40)\b", sizes)]
    loss = language_model_loss(STUDENT, OBJECTIVE, live=SHAPES, mesh=mesh)
    of_teachers = lambda frozen: loss(student, batch(), jnp.int32(0), frozen).loss  # noqa: E731
    slopes = jax.jit(jax.grad(of_teachers))(frozen)
    chex.assert_trees_all_equal(slopes, jax.tree.map(jnp.zeros_like, frozen))


def test_the_step_consumes_its_state_and_no_teacher():
    mesh = parallel.make_mesh()
    student = models.abstract_params(STUDENT)
    frozen = {name: placed(SHAPES[name], tree, mesh) for name, tree in teachers().items()}
    jitted = jit_step(
        student,
        models.logical_axes(STUDENT),
        language_model_loss(STUDENT, OBJECTIVE, live=SHAPES, mesh=mesh),
        TrainConfig(steps=1),
        mesh,
        frozen,
    )
    arguments, _ = jitted.function.lower(jitted.state, batch(), frozen).args_info
    donated = [{leaf.donated for leaf in jax.tree.leaves(tree)} for tree in arguments]
    assert donated == [{True}, {False}, {False}]


@pytest.mark.slow
def test_training_takes_teachers_wherever_they_are_and_leaves_them_so(tmp_path):
    mesh = parallel.make_mesh(parallel.MeshConfig(), jax.devices()[:2])
    on_one = jax.device_put(teachers())  # from where a step could take them away
    whole = {name: models.Model(SHAPES[name], tree) for name, tree in on_one.items()}
    train(
        models.Model(STUDENT, jax.device_put(params(STUDENT, 0))),
        language_model_loss(STUDENT, OBJECTIVE, live=SHAPES, mesh=mesh),
        iter([batch()]),
        TrainConfig(steps=1, batch_rows=ROWS),
        tmp_path,
        teachers=whole,
        mesh=mesh,
    )
    chex.assert_trees_all_equal({name: model.params for name, model in whole.items()}, teachers())
    loss, _ = beforehand(params(STUDENT, 0))
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["loss"] == pytest.approx(float(loss) / batch()["where"].sum(), rel=1e-5)
    assert min(line["large"], line["small"]) > 0.01


@pytest.mark.parametrize("names", [(), ("small",), ("small", "large", "other")])
def test_other_teachers_than_the_loss_reads_are_refused(names):
    loss = language_model_loss(STUDENT, OBJECTIVE, live=SHAPES)
    frozen = [dict.fromkeys(names)] if names else []
    with pytest.raises(InputError, match=r"are given, the loss reads \['large', 'small'\]"):
        loss(params(STUDENT, 0), batch(), jnp.int32(0), *frozen)


def test_another_vocabulary_is_refused():
    wide = {"large": dataclasses.replace(SHAPES["large"], vocab_size=V + 1)}
    with pytest.raises(InputError, match=f"teacher large: has {V + 1} token ids, the student {V}"):
        language_model_loss(STUDENT, OBJECTIVE, live=wide)
