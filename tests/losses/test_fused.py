import functools
import re

import chex
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distill_jax import losses
from distill_jax.losses import chunks

from . import oracles

N, D, V = 48, 5, 23


def ramp(step):
    return 0.1 * step


OBJECTIVES = {
    "hard": losses.hard_labels(z_loss=1e-2, label_smoothing=0.1),
    "dense": losses.distill("dense", losses.reverse_kl, temperature=2.0),
    "top_k": losses.distill("top_k", losses.forward_kl),
    "sampled": losses.distill("sampled", losses.forward_kl),
    "sum": losses.weighted_sum(
        hard=(0.3, losses.hard_labels(z_loss=1e-2)),
        dense=(ramp, losses.distill("dense", losses.jensen_shannon)),
        top_k=(0.7, losses.distill("top_k", losses.forward_kl)),
    ),
}


@functools.cache
def inputs():
    rng = np.random.default_rng(0)
    teacher = rng.normal(size=(N, V)) * 2
    targets = {
        "labels": jnp.asarray(rng.integers(0, V, N)),
        "dense": jnp.asarray(teacher, jnp.float32),
        "top_k": oracles.top_k(teacher, 4)[0],
        "sampled": oracles.sampled(teacher, 6, rng),
    }
    hidden = jnp.asarray(rng.normal(size=(N, D)), jnp.float32)
    unembedding = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    where = jnp.asarray(rng.uniform(size=N) * (rng.uniform(size=N) > 0.3), jnp.float32)
    return hidden, unembedding, targets, where, jnp.asarray(3)


def unfused(objective, hidden, unembedding, targets, where, step):
    logits = jnp.asarray(hidden @ unembedding, jnp.float32)
    return losses.reduce(*objective(logits, targets, step=step), where)


def fused(objective, hidden, unembedding, targets, where, step, chunk=16):
    return losses.fused_linear(
        objective, hidden, unembedding, targets, where, step=step, chunk=chunk
    )


def mean_and_gradients(head, objective, arrays, **kwargs):
    def mean(*arrays):
        return head(objective, *arrays, **kwargs).mean()

    return jax.jit(jax.value_and_grad(mean, argnums=(0, 1), has_aux=True))(*arrays)


def rows(count):
    hidden, unembedding, targets, where, step = inputs()
    take = functools.partial(jax.tree.map, lambda leaf: leaf[:count])
    return take(hidden), unembedding, take(targets), take(where), step


def only(name, arrays):
    """The inputs with the targets that an objective needs, so that no others are there to help."""
    hidden, unembedding, targets, where, step = arrays
    key = {"hard": "labels"}.get(name, name)
    targets = targets if name == "sum" else {key: targets[key]}
    return hidden, unembedding, targets, where, step


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_equals_unfused(name):
    arrays = only(name, rows(37))
    objective = OBJECTIVES[name]
    chex.assert_trees_all_close(
        mean_and_gradients(fused, objective, arrays, chunk=8),
        mean_and_gradients(unfused, objective, arrays),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("chunk", [1, 1000, None])
def test_any_chunk_will_do(chunk):
    arrays = rows(37)
    objective = OBJECTIVES["top_k"]
    chex.assert_trees_all_close(
        mean_and_gradients(fused, objective, arrays, chunk=chunk),
        mean_and_gradients(unfused, objective, arrays),
        rtol=1e-5,
        atol=1e-6,
    )


def test_any_function_of_the_form_will_do():
    def margin(logits_NV, targets, *, step=None):
        del step
        gap = logits_NV.max(-1) - logits_NV[:, 0] * targets["scale"][:, 0]
        return jnp.square(gap), {"gap": gap}

    hidden, unembedding, _, where, step = inputs()
    arrays = hidden, unembedding, {"scale": jnp.linspace(0, 1, N)[:, None]}, where, step
    chex.assert_trees_all_close(
        mean_and_gradients(fused, margin, arrays),
        mean_and_gradients(unfused, margin, arrays),
        rtol=1e-5,
        atol=1e-6,
    )


def test_value_without_gradient_equals_value_with_it():
    arrays = inputs()
    (loss, terms), _ = mean_and_gradients(fused, OBJECTIVES["sum"], arrays)
    evaluate = jax.jit(functools.partial(fused, OBJECTIVES["sum"]))
    chex.assert_trees_all_close(evaluate(*arrays).mean(), (loss, terms), rtol=1e-6)


def test_cotangent_scales_the_gradient_and_terms_have_none():
    hidden, unembedding, targets, where, step = inputs()

    def scaled(hidden, unembedding, loss_weight, term_weight):
        totals = fused(OBJECTIVES["sum"], hidden, unembedding, targets, where, step)
        return loss_weight * totals.loss + term_weight * sum(totals.terms.values())

    slopes = jax.jit(jax.grad(scaled, argnums=(0, 1)))
    once = slopes(hidden, unembedding, 1.0, 0.0)
    chex.assert_trees_all_close(
        slopes(hidden, unembedding, -2.5, 3.0), jax.tree.map(lambda x: -2.5 * x, once), rtol=1e-6
    )


def test_targets_and_weights_get_no_gradient():
    hidden, unembedding, targets, where, _ = inputs()

    def loss(targets, where, step):
        return fused(OBJECTIVES["sum"], hidden, unembedding, targets, where, step).loss

    slopes = jax.grad(loss, argnums=(0, 1, 2), allow_int=True)(targets, where, 3.0)
    for slope in jax.tree.leaves(slopes):
        if slope.dtype != jax.dtypes.float0:
            np.testing.assert_array_equal(slope, 0.0)


def test_masked_tokens_may_hold_anything():
    hidden, unembedding, targets, where, step = inputs()
    spoilt = {**targets, "labels": jnp.where(where == 0, -100, targets["labels"])}
    objective = OBJECTIVES["hard"]
    chex.assert_trees_all_equal(
        mean_and_gradients(fused, objective, (hidden, unembedding, spoilt, where, step)),
        mean_and_gradients(fused, objective, (hidden, unembedding, targets, where, step)),
    )


def test_nothing_to_learn_from_gives_zero():
    hidden, unembedding, targets, where, step = inputs()
    result = mean_and_gradients(
        fused, OBJECTIVES["hard"], (hidden, unembedding, targets, jnp.zeros_like(where), step)
    )
    chex.assert_trees_all_equal(result, jax.tree.map(jnp.zeros_like, result))


def test_bfloat16_adds_up_in_float32():
    """2048 equal chunks: bfloat16 sums would stall once they are 256 times a chunk's share."""
    tokens = 2048
    hidden = jnp.ones((tokens, 1), jnp.bfloat16)
    unembedding = jnp.zeros((1, 2), jnp.bfloat16)
    targets = {"labels": jnp.zeros(tokens, jnp.int32)}

    def total(hidden, unembedding):
        return losses.fused_linear(losses.hard_labels(), hidden, unembedding, targets, chunk=1).loss

    slopes = jax.jit(jax.grad(total, argnums=(0, 1)))(hidden, unembedding)
    assert slopes[0].dtype == slopes[1].dtype == jnp.bfloat16
    np.testing.assert_allclose(slopes[1].astype(jnp.float32), [[-1024.0, 1024.0]])


def test_mixed_dtypes_get_gradients_of_their_own():
    hidden, unembedding, targets, where, step = inputs()
    arrays = hidden.astype(jnp.bfloat16), unembedding, targets, where, step
    _, (hidden_bar, unembedding_bar) = mean_and_gradients(fused, OBJECTIVES["top_k"], arrays)
    _, expected = mean_and_gradients(unfused, OBJECTIVES["top_k"], arrays)
    assert (hidden_bar.dtype, unembedding_bar.dtype) == (jnp.bfloat16, jnp.float32)
    chex.assert_trees_all_close(unembedding_bar, expected[1], rtol=1e-5, atol=1e-6)


def _mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


SPECS = (P("data"), P(), P("data"), P("data"), P())


def _sharded(mesh):
    return tuple(
        jax.tree.map(lambda leaf, spec=spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree)
        for tree, spec in zip(inputs(), SPECS, strict=True)
    )


def test_sharded_tokens_stay_where_they_are():
    arrays = _sharded(_mesh())
    objective = OBJECTIVES["sum"]

    def mean(*arrays):
        return fused(objective, *arrays).mean()

    step = jax.jit(jax.value_and_grad(mean, argnums=(0, 1), has_aux=True))
    expected = mean_and_gradients(unfused, objective, inputs())
    chex.assert_trees_all_close(step(*arrays), expected, rtol=1e-5, atol=1e-6)
    compiled = step.lower(*arrays).compile().as_text()
    assert re.search(r"all-reduce\(", compiled)
    assert not re.search(r"(all-gather|all-to-all|collective-permute)\(", compiled)


@pytest.mark.parametrize("check", [True, False])
def test_shard_map_equals_one_device(check):
    mesh = _mesh()
    objective = OBJECTIVES["sum"]

    def head(objective, *arrays):
        def local(*arrays):
            return jax.lax.psum(fused(objective, *arrays, chunk=4), "data")

        return jax.shard_map(local, mesh=mesh, in_specs=SPECS, out_specs=P(), check_vma=check)(
            *arrays
        )

    chex.assert_trees_all_close(
        mean_and_gradients(head, objective, _sharded(mesh)),
        mean_and_gradients(unfused, objective, inputs()),
        rtol=1e-5,
        atol=1e-6,
    )


def test_default_chunk():
    assert losses.default_chunk(100, 4096) == 100
    assert losses.default_chunk(0, 4096) == 1
    assert losses.default_chunk(8192, 2048) == 1024  # 2 * 1024 logits a token's column: as D
    assert losses.default_chunk(8192, 8192) == 2048
    assert losses.default_chunk(8192, 64) == 256
    assert losses.default_chunk(1025, 2048) == 528  # two chunks, not 1024 and 1
    assert losses.default_chunk(896, 512) == 224  # four, without padding
    assert losses.default_chunk(4096, 2048, live=1) == 592  # with a teacher's logits: D / 3
    assert losses.default_chunk(4096, 2048, live=2) == 512
    assert losses.default_chunk(16384, 2048, least=2240) == 2048  # eight, not 16 of 1024
    assert losses.default_chunk(16384, 2048, live=1, least=2240) == 1104  # half of 2240 a model
    assert losses.default_chunk(16384, 2048, live=1, least=900) == 656  # 25 of a third of D
    assert losses.default_chunk(8192, 64, least=0) == 256


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [256, 300])
def test_blocks_of_rows_and_tiles_of_the_vocabulary_change_nothing(vocabulary, monkeypatch):
    rng = np.random.default_rng(1)
    teacher = rng.normal(size=(N, vocabulary))
    targets = {"dense": jnp.asarray(teacher), "top_k": oracles.top_k(teacher, 4)[0]}
    targets["labels"] = jnp.asarray(rng.integers(0, vocabulary, N))
    hidden, _, _, where, step = inputs()
    unembedding = jnp.asarray(rng.normal(size=(D, vocabulary)), jnp.float32)
    arrays = hidden, unembedding, targets, where, step
    expected = mean_and_gradients(unfused, OBJECTIVES["sum"], arrays)
    monkeypatch.setattr(chunks, "_CACHED_ELEMENTS", 5 * vocabulary)  # 4 rows of a chunk of 16
    monkeypatch.setattr(chunks, "_TILE_ELEMENTS", 1)  # the least tile, 128 ids

    def mean(*arrays):
        return fused(OBJECTIVES["sum"], *arrays).mean()

    step = jax.jit(jax.value_and_grad(mean, argnums=(0, 1), has_aux=True))
    chex.assert_trees_all_close(step(*arrays), expected, rtol=1e-5, atol=1e-6)
    compiled = step.lower(*arrays).compile().as_text()
    assert f"f32[4,{vocabulary}]" in compiled
    assert f"f32[{D},128]" in compiled


@pytest.mark.parametrize("tile", [1, 2**22])
def test_transposed_unembedding(tile, monkeypatch):
    monkeypatch.setattr(chunks, "_TILE_ELEMENTS", tile)
    rng = np.random.default_rng(1)
    hidden, _, _, where, step = inputs()
    targets = {"labels": jnp.asarray(rng.integers(0, 300, N))}
    unembedding = jnp.asarray(rng.normal(size=(D, 300)), jnp.float32)
    arrays = hidden, unembedding, targets, where, step
    loss, (hidden_bar, bar_DV) = mean_and_gradients(unfused, OBJECTIVES["hard"], arrays)

    def tied(objective, hidden, unembedding, targets, where, step):
        return losses.fused_linear(
            objective, hidden, unembedding, targets, where, step=step, chunk=16, transposed=True
        )

    arrays = hidden, unembedding.T, targets, where, step
    result = mean_and_gradients(tied, OBJECTIVES["hard"], arrays)
    chex.assert_trees_all_close(result, (loss, (hidden_bar, bar_DV.T)), rtol=1e-5, atol=1e-6)
    jaxpr = str(jax.make_jaxpr(jax.grad(lambda *a: tied(OBJECTIVES["hard"], *a).loss))(*arrays))
    assert f"f32[{D},300]" not in jaxpr  # it is never turned around
    with pytest.raises(ValueError, match=r"must be \[N, D\] and \[V, D\]"):
        tied(OBJECTIVES["hard"], hidden[0], *arrays[1:])


def test_masked_tokens_may_hold_nan_and_get_no_gradient():
    hidden, unembedding, targets, where, step = inputs()
    spoil = lambda leaf: jnp.where(  # noqa: E731
        (where == 0).reshape(-1, *[1] * (leaf.ndim - 1)), jnp.nan, leaf
    )
    spoilt = {**targets, "dense": spoil(targets["dense"])}
    arrays = hidden, unembedding, targets, where, step
    chex.assert_trees_all_equal(
        mean_and_gradients(
            fused, OBJECTIVES["dense"], (spoil(hidden), unembedding, spoilt, where, step)
        )[0],
        mean_and_gradients(fused, OBJECTIVES["dense"], arrays)[0],
    )
    _, slopes = mean_and_gradients(
        fused, OBJECTIVES["dense"], (spoil(hidden), unembedding, spoilt, where, step)
    )
    _, expected = mean_and_gradients(fused, OBJECTIVES["dense"], arrays)
    chex.assert_trees_all_equal(slopes, expected)


@pytest.mark.parametrize("differentiate", [jax.jacfwd, jax.hessian])
def test_other_derivatives_are_refused(differentiate):
    hidden, unembedding, targets, where, step = inputs()

    def loss(hidden):
        return fused(OBJECTIVES["hard"], hidden, unembedding, targets, where, step).loss

    with pytest.raises(TypeError, match=r"fused_linear has no (forward-mode|second) derivative"):
        differentiate(loss)(hidden)
    with pytest.raises(TypeError, match="fused_linear has no second derivative"):
        jax.jit(jax.grad(lambda hidden: jax.grad(loss)(hidden).sum()))(hidden)


def test_what_does_not_fit_is_refused():
    hidden, unembedding, targets, where, _ = inputs()
    hard = losses.hard_labels()
    with pytest.raises(ValueError, match="does not fit unembedding"):
        losses.fused_linear(hard, hidden, unembedding.T, targets)
    with pytest.raises(ValueError, match=r"where .* does not fit 48 tokens"):
        losses.fused_linear(hard, hidden, unembedding, targets, where[1:])
    with pytest.raises(ValueError, match=r"targets/labels .* does not fit 48 tokens"):
        losses.fused_linear(hard, hidden, unembedding, {"labels": targets["labels"][:5]})
    with pytest.raises(ValueError, match=r"must be \[N, D\]"):
        losses.fused_linear(hard, hidden[None], unembedding, targets)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        losses.fused_linear(hard, hidden, unembedding, targets, chunk=-1)
    with pytest.raises(ValueError, match="has no tokens"):
        losses.fused_linear(hard, hidden[:0], unembedding, {"labels": targets["labels"][:0]})
    with pytest.raises(ValueError, match="pass step"):
        losses.fused_linear(OBJECTIVES["sum"], hidden, unembedding, targets)
