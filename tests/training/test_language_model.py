"""The loss on a mesh, where every device holds a share of the parameters."""

import dataclasses
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn_params
from jax.extend.core import jaxprs_in_params

from distill_jax import losses, models, parallel
from distill_jax.training import language_model_loss, values_of_rows

ROWS, TIME = 8, 16


def shape(tied=True):
    return models.LlamaConfig(
        vocab_size=64, embed=32, mlp=48, layers=2, heads=4, kv_heads=2, head_dim=8, tied=tied
    )


def batch():
    rng = np.random.default_rng(0)
    ids = np.ones((ROWS, TIME), np.int32)
    ids[:, 9:] = 2
    return {
        "tokens": rng.integers(0, 8, (ROWS, TIME)).astype(np.int32),  # each many times
        "labels": rng.integers(0, 64, (ROWS, TIME)).astype(np.int32),
        "segment_ids": ids,
        "where": (rng.random((ROWS, TIME)) < 0.7).astype(np.float32),
    }


def step(config, mesh, rows=None, **options):
    loss = language_model_loss(config, losses.hard_labels(), mesh=mesh, **options)
    rows = rows or batch()
    return jax.jit(jax.value_and_grad(lambda params: loss(params, rows, jnp.int32(0)).loss))


def placed(config, mesh):
    params = drawn_params(config)
    if mesh is None:
        return params
    return jax.device_put(params, parallel.shardings(mesh, models.logical_axes(config), params))


@pytest.mark.parametrize(
    ("sizes", "tied", "remat"),
    [
        pytest.param({"data": 2, "fsdp_minor": 2}, False, "attention", marks=pytest.mark.slow),
        ({"data": 2, "tensor": 2}, True, "full"),
    ],
)
def test_any_mesh_gives_the_loss_and_the_gradient_of_one_device(sizes, tied, remat):
    config, mesh = shape(tied), parallel.make_mesh(parallel.MeshConfig(**sizes))
    expected = step(config, None)(placed(config, None))
    loss, gradient = step(config, mesh, remat=remat)(placed(config, mesh))
    chex.assert_trees_all_close((loss, gradient), expected, rtol=1e-5, atol=1e-5)
    places = parallel.shardings(mesh, models.logical_axes(config), gradient)
    lies_as = lambda g, place: g.sharding.is_equivalent_to(place, g.ndim)  # noqa: E731
    assert all(jax.tree.leaves(jax.tree.map(lies_as, gradient, places)))


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 1}, {"fsdp": 2}, {"fsdp": 1, "sequence": 2}], ids=["one", "rows", "times"]
)
@pytest.mark.parametrize(("least", "tokens"), [(0, 256), (384, 384)])
def test_the_head_takes_the_tokens_that_the_chip_wants_at_a_time(sizes, least, tokens, monkeypatch):
    monkeypatch.setattr(parallel, "least_chunk", lambda mesh: least)
    devices = math.prod(sizes.values())
    mesh = parallel.make_mesh(parallel.MeshConfig(**sizes), jax.devices()[:devices])
    rows = {name: np.tile(array, 6 * devices) for name, array in batch().items()}
    text = str(step(shape(), mesh, rows=rows).trace(placed(shape(), mesh)).jaxpr)
    assert f"f32[{tokens},64]" in text  # logits of as many of a device's 768 tokens
    assert f"f32[{640 - tokens},64]" not in text


@pytest.mark.slow
def test_without_a_gradient_none_is_computed():
    config, mesh = shape(), parallel.make_mesh()
    loss = language_model_loss(config, losses.hard_labels(), mesh=mesh)
    run = jax.jit(lambda params: loss(params, batch(), jnp.int32(0)).loss)
    text = run.lower(placed(config, mesh)).compile().as_text()
    assert "reduce-scatter" not in text
    expected, _ = step(config, None)(placed(config, None))
    np.testing.assert_allclose(run(placed(config, mesh)), expected, rtol=1e-6)


def test_gradients_are_scattered_in_float32_and_never_summed_whole():
    config, mesh = shape(), parallel.make_mesh(parallel.MeshConfig(fsdp_minor=2))
    run = step(config, mesh, compute_dtype="bfloat16", remat="full")
    text = run.lower(placed(config, mesh)).compile().as_text()
    scattered = set(re.findall(r"= (\w+)\[\S* reduce-scatter", text))
    assert scattered == {"f32"}
    whole = [
        int(np.prod([int(size) for size in sizes.split(",")]))
        for results in re.findall(r"= (.*) all-reduce(?:-start)?\(", text)
        for sizes in re.findall(r"\w\[([\d,]+)\]", results)
    ]
    assert not [size for size in whole if size > 1]  # the totals alone


def test_collectives_say_of_what_they_are():
    config, mesh = shape(tied=True), parallel.make_mesh(parallel.MeshConfig(fsdp_minor=2))
    run = step(config, mesh, remat="full")
    text = run.lower(placed(config, mesh)).as_text(debug_info=True)
    layers = jax.tree.leaves_with_path(models.abstract_params(config)["layers"])
    named = {".".join(["layers", *(key.key for key in path)]) for path, _ in layers}
    for kind, collective in (("whole", "all_gather"), ("gradient", "reduce_scatter")):
        found = set(re.findall(rf"[/\(]{kind}\.([\w.]+)\W[^\"]*{collective}", text))
        assert found >= named, (kind, named - found)


def kept_for_the_backward_pass(jaxpr, inside=False):
    """Shapes that scans inside of `shard_map` give."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if inside and name == "scan":
            yield from (variable.aval.shape for variable in equation.outvars)
        for part in jaxprs_in_params(equation.params):
            yield from kept_for_the_backward_pass(part, inside or name == "shard_map")


@pytest.mark.parametrize("remat", ["none", "dots", "attention"])
def test_no_parameters_that_were_made_whole_wait_for_the_backward_pass(remat):
    config = dataclasses.replace(shape(), embed=40)  # as many as no device has tokens
    mesh = parallel.make_mesh(parallel.MeshConfig(data=2, tensor=2))
    jaxpr = jax.make_jaxpr(step(config, mesh, remat=remat))(placed(config, mesh))
    kept = set(kept_for_the_backward_pass(jaxpr.jaxpr))
    D, F, L = config.embed, config.mlp, config.layers
    assert (L, D // 2, F) in kept  # the gradient of shares
    assert not kept & {(L, D, F), (L, F, D)}


@pytest.mark.slow
def test_bfloat16_computes_and_float32_learns():
    config, mesh = shape(), parallel.make_mesh()
    exact, expected = step(config, None)(placed(config, None))
    loss, gradient = step(config, mesh, compute_dtype="bfloat16")(placed(config, mesh))
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    assert loss == pytest.approx(float(exact), rel=0.01)
    assert loss != exact
    size = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    chex.assert_trees_all_close(gradient, expected, atol=0.03 * size)
    alone = step(config, None, compute_dtype="bfloat16")(placed(config, None))
    chex.assert_trees_all_close((loss, gradient), alone, rtol=0.02, atol=0.01 * size)


@pytest.mark.parametrize("devices", [None, pytest.param(8, marks=pytest.mark.slow)])
def test_values_of_rows_come_from_the_device_that_has_them(devices):
    config, mesh = shape(), None if devices is None else parallel.make_mesh()
    here = batch()

    def values(params, rows, reading):
        count = rows["tokens"].shape[0]  # of the rows that are computed with at once
        table = reading.unembedding(params)
        return jnp.stack([rows["labels"][:, 0], jnp.full(count, count)], axis=1) + 0 * table[0, 0]

    found = values_of_rows(config, values, mesh=mesh)(placed(config, mesh), here)
    np.testing.assert_array_equal(found[:, 0], here["labels"][:, 0])
    np.testing.assert_array_equal(found[:, 1], ROWS // (devices or 1))
