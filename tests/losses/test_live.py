"""Teachers that run beside the student: their logits are made in the fused head's chunks."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distill_jax import losses
from distill_jax.losses import chunks

from . import oracles
from .test_fused_work import _shapes
from .test_sharded_head import make_mesh, shapes_of

N, D, V, CHUNK = 48, 6, 64, 8
TEMPERATURE = 1.5
MIXED = losses.distill_mixture({"small": 0.3, "large": 0.7}, losses.reverse_kl)
OBJECTIVES = {
    "moving": losses.taid("small", 0.4, temperature=2.0),
    "mixture": losses.token_weighted(MIXED, losses.agreement("small", "large")),
    "confidence": losses.distill_mixture(
        {name: losses.label_confidence(name) for name in ("small", "large")}, losses.forward_kl
    ),
}
QUICK = ("reverse_kl", "moving")


def objective(name):
    """Labels, a teacher as it is, and another one at a temperature."""
    one = oracles.loss(name)
    return losses.weighted_sum(
        hard=(0.2, losses.hard_labels()),
        small=(0.3, losses.distill("small", one)),
        large=(0.5, losses.distill("large", one, temperature=TEMPERATURE)),
    )


@functools.cache
def problem():
    """Hidden states and unembeddings of a student and of two teachers of other widths."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    targets = {
        "labels": jnp.asarray(rng.integers(0, V, N)),
        "small": losses.LiveTargets(normal(N, 4), normal(V, 4), transposed=True),
        "large": losses.LiveTargets(normal(N, 10), normal(10, V)),
    }
    where = jnp.asarray(rng.uniform(size=N) * (rng.uniform(size=N) > 0.3), jnp.float32)
    return normal(N, D), normal(D, V), targets, where


def logits(live):
    """In float64."""
    head = np.asarray(live.unembedding, np.float64)
    return np.asarray(live.hidden, np.float64) @ (head.T if live.transposed else head)


def dense(targets):
    """The targets with what a teacher's logits are, computed beforehand."""
    live = {name: one for name, one in targets.items() if isinstance(one, losses.LiveTargets)}
    return {**targets, **{n: jnp.asarray(logits(one), jnp.float32) for n, one in live.items()}}


def unfused(objective, hidden, unembedding, targets, where):
    return losses.reduce(*objective(hidden @ unembedding, dense(targets)), where).mean()


def value_and_gradients(head, objective, arrays):
    def mean(hidden, unembedding, targets, where):
        totals = head(objective, hidden, unembedding, targets, where)
        return totals.mean() if isinstance(totals, losses.Totals) else totals

    return jax.value_and_grad(mean, argnums=(0, 1), has_aux=True)(*arrays)


def one_device(objective, arrays):
    head = functools.partial(losses.fused_linear, chunk=CHUNK)
    return jax.jit(functools.partial(value_and_gradients, head, objective))(arrays)


def on_mesh(mesh, objective):
    head = functools.partial(losses.sharded_fused_linear, mesh=mesh, chunk=CHUNK)
    return jax.jit(functools.partial(value_and_gradients, head, objective))


def split():
    """The large teacher's unembedding split as the student's, the small one's whole."""
    hidden, unembedding, targets, where = problem()
    small = dataclasses.replace(targets["small"], embed=())
    return hidden, unembedding, {**targets, "small": small}, where


@pytest.mark.parametrize("name", oracles.DIVERGENCES)
def test_equals_the_definition_on_logits_that_were_there_before(name):
    hidden, unembedding, targets, where = problem()
    (loss, terms), _ = one_device(objective(name), problem())
    student = np.asarray(hidden, np.float64) @ np.asarray(unembedding, np.float64)
    weight = np.asarray(where, np.float64)

    def mean(teacher, temperature):
        p, q = (oracles.softmax(x, temperature) for x in (logits(targets[teacher]), student))
        values = temperature**2 * oracles.divergence(name, p, q)
        return (values * weight).sum() / weight.sum()

    small, large = mean("small", 1.0), mean("large", TEMPERATURE)
    np.testing.assert_allclose([terms["small"], terms["large"]], [small, large], rtol=1e-5)
    picked = np.take_along_axis(
        np.log(oracles.softmax(student)), np.asarray(targets["labels"])[:, None], -1
    )
    hard = -(picked[:, 0] * weight).sum() / weight.sum()
    np.testing.assert_allclose(loss, 0.2 * hard + 0.3 * small + 0.5 * large, rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in (*oracles.DIVERGENCES, *OBJECTIVES)
    ],
)
def test_gradients_are_those_of_dense_logits_on_one_device_and_eight(name):
    chosen = OBJECTIVES[name] if name in OBJECTIVES else objective(name)
    expected = value_and_gradients(unfused, chosen, problem())
    chex.assert_trees_all_close(one_device(chosen, problem()), expected, rtol=1e-5, atol=1e-6)
    actual = on_mesh(make_mesh(2, 2, 2), chosen)(split())
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_on_a_mesh_the_vocabulary_stays_split_and_each_head_is_gathered_as_it_lies():
    mesh, local = make_mesh(2, 2, 2), V // 2
    put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, P(*axes)))  # noqa: E731
    hidden, unembedding, targets, where = split()
    small, large = targets["small"], targets["large"]
    small = dataclasses.replace(small, unembedding=put(small.unembedding, "tensor"))
    large = dataclasses.replace(large, unembedding=put(large.unembedding, "fsdp", "tensor"))
    arrays = hidden, put(unembedding, "fsdp", "tensor"), {**targets, "small": small, "large": large}
    text = on_mesh(mesh, objective("reverse_kl")).lower((*arrays, where)).compile().as_text()
    assert f"[{CHUNK},{local}]" in text
    assert not re.search(rf"\[(?:\d+,)*{V}(?:,\d+)*\]", text)
    assert shapes_of("all-gather", text) == {f"f32[{D},{local}]", f"f32[10,{local}]"}
    assert not shapes_of("all-to-all|collective-permute", text)


def test_holds_the_logits_of_one_chunk_and_multiplies_each_once():
    def loss(*arrays):
        return losses.fused_linear(objective("jensen_shannon"), *arrays, chunk=CHUNK).loss

    for function, products in ((loss, 3), (jax.grad(loss, argnums=(0, 1)), 5)):
        jaxpr = jax.make_jaxpr(function)(*problem())
        sizes = [int(np.prod(shape)) for shape in _shapes(jaxpr.jaxpr) if V in shape]
        assert max(sizes) == CHUNK * V
        assert str(jaxpr).count("dot_general") == products


def test_blocks_of_a_chunk_see_their_own_rows_of_a_teacher(monkeypatch):
    chosen = objective("skewed_reverse_kl")
    expected = value_and_gradients(unfused, chosen, problem())
    monkeypatch.setattr(chunks, "_CACHED_ELEMENTS", 2 * V)  # two rows of a chunk
    chex.assert_trees_all_close(one_device(chosen, problem()), expected, rtol=1e-5, atol=1e-6)


def test_a_teacher_has_no_gradient():
    arrays = problem()
    slopes = jax.grad(
        lambda t: losses.fused_linear(objective("reverse_kl"), *arrays[:2], t, arrays[3]).loss,
        allow_int=True,
    )(arrays[2])
    for name in ("small", "large"):
        chex.assert_trees_all_equal(slopes[name], jax.tree.map(jnp.zeros_like, arrays[2][name]))


def test_what_a_masked_token_holds_changes_nothing():
    hidden, unembedding, targets, where = problem()
    nothing = (where == 0)[:, None]
    large = targets["large"]
    damaged = dataclasses.replace(large, hidden=jnp.where(nothing, jnp.nan, large.hidden))
    assert jnp.isnan(damaged.hidden).any()
    arrays = hidden, unembedding, {**targets, "large": damaged}, where
    chosen = objective("forward_kl")
    chex.assert_trees_all_equal(one_device(chosen, arrays), one_device(chosen, problem()))


def test_logits_of_a_narrow_teacher_are_added_up_wide():
    """320 products of 1 and 1 + 1/128 make 322.5, which bfloat16 does not hold."""
    seen = []

    def spied(logits_NV, targets, *, step=None):
        seen.append(targets["large"].dtype)
        return targets["large"][:, 0] + 0 * logits_NV[:, 0], {}

    hidden, unembedding, _, where = problem()
    ones = jnp.ones((N, 320), jnp.bfloat16)
    live = losses.LiveTargets(ones, jnp.full((320, V), 1 + 2**-7, jnp.bfloat16))
    loss, _ = losses.fused_linear(spied, hidden, unembedding, {"large": live}, where).mean()
    assert {str(dtype) for dtype in seen} == {"float32"}
    assert loss == pytest.approx(322.5, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": jnp.ones((N, 9))}, r"large: hidden \(48, 9\) does not fit unembedding \(10, 6"),
        ({"transposed": True}, r"large: hidden \(48, 10\) does not fit unembedding"),
        ({"hidden": jnp.ones((N - 1, 10))}, r"targets/large/hidden \(47, 10\) does not fit 48"),
        ({"unembedding": jnp.ones((10, V + 1))}, "large: has 65 ids, the student 64"),
        ({"unembedding": jnp.ones(10)}, r"large: hidden and unembedding must be \[N, D\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    hidden, unembedding, targets, where = problem()
    wrong = {**targets, "large": dataclasses.replace(targets["large"], **change)}
    with pytest.raises(ValueError, match=message):
        losses.fused_linear(objective("forward_kl"), hidden, unembedding, wrong, where)


def test_what_does_not_fit_a_mesh_is_refused():
    hidden, unembedding, targets, where = problem()
    mesh = make_mesh(1, 4, 2)
    head = functools.partial(losses.sharded_fused_linear, objective("forward_kl"), mesh=mesh)
    with pytest.raises(ValueError, match="large: embed: 10 do not divide over 4 devices"):
        head(hidden[:, :4], unembedding[:4], targets, where)
    elsewhere = dataclasses.replace(targets["large"], embed=("model",))
    with pytest.raises(ValueError, match="do not fit a mesh with axes"):
        head(hidden[:, :4], unembedding[:4], {**targets, "large": elsewhere}, where)


@pytest.mark.slow
def test_outside_of_a_fused_head_logits_are_wanted():
    hidden, unembedding, targets, _ = problem()
    with pytest.raises(TypeError, match=r"must be an array of logits.* got LiveTargets"):
        losses.forward_kl(hidden @ unembedding, targets["large"])
