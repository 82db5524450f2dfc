import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpy_llama
import pytest
import tiny

from distill_jax import models, parallel
from distill_jax.artifacts import InputError
from distill_jax.pruning import apply_plan, make_plan, tie, tying_sums
from distill_jax.pruning.prune import jit_tie
from distill_jax.pruning.tying import TyingSums

WEIGHT = 0.1


def problem(embed=9):
    model, batch = tiny.model(), tiny.rows(8)
    target = dataclasses.replace(tiny.SOURCE, embed=embed, tied=True)
    return make_plan(tiny.random_scores(tiny.SOURCE), tiny.SOURCE, target), model, batch


def by_hand(plan, model, batch):
    """Hidden states [N, D'], reads [V], embedding and centred unembedding [V, D']."""
    rows = [
        numpy_llama.row_activations(model.config, model.params, *row)[1][row[1] > 0]
        for row in zip(batch["tokens"], batch["segment_ids"], strict=True)
    ]
    read = batch["tokens"][batch["segment_ids"] > 0]
    counts = np.bincount(read, minlength=model.config.vocab_size) + 1
    kept = plan.embed
    embedding = numpy_llama.f64(model.params["embedding"])[:, kept]
    unembedding = numpy_llama.f64(model.params["unembedding"])[kept].T
    unembedding = unembedding - unembedding.mean(0)
    return np.concatenate(rows)[:, kept], counts, embedding, unembedding


def error(matrix, gain, hidden, counts, embedding, unembedding):
    """What is to be least, token by token."""
    ends = (counts * ((matrix - embedding) ** 2).sum(1)).sum()
    logits = ((hidden @ (matrix * gain - unembedding).T) ** 2).sum()
    powers = (counts * (embedding**2).sum(1)).sum(), ((hidden @ unembedding.T) ** 2).sum()
    return WEIGHT * ends / powers[0] + logits / powers[1]


@pytest.mark.slow
def test_every_token_s_row_is_the_least_squares_solution():
    plan, model, batch = problem()
    sums = tying_sums(model, tiny.split(batch, 3))
    tied = jax.jit(lambda params, sums: tie(plan, params, sums, weight=WEIGHT))(model.params, sums)
    matrix = numpy_llama.f64(tied["embedding"])[:, plan.embed]
    gain = (tied["final_norm"] / model.params["final_norm"])[plan.embed]
    hidden, counts, embedding, unembedding = values = by_hand(plan, model, batch)
    pull = WEIGHT * ((hidden @ unembedding.T) ** 2).sum() / (counts @ (embedding**2).sum(1))
    for token in range(model.config.vocab_size):
        # The embedding's error as further rows of the design.
        root = np.sqrt(pull * counts[token])
        design = np.concatenate((hidden * gain, root * np.eye(len(gain))))
        wanted = np.concatenate((hidden @ unembedding[token], root * embedding[token]))
        solution = np.linalg.lstsq(design, wanted, rcond=None)[0]
        np.testing.assert_allclose(matrix[token], solution, rtol=1e-3, atol=1e-4)
    plain = error(embedding, np.ones(len(gain)), *values)
    assert error(matrix, gain, *values) < 0.7 * plain
    rest = np.setdiff1d(np.arange(12), plan.embed)
    for name, axis in (("embedding", 1), ("final_norm", 0)):
        old, new = (np.take(np.asarray(p[name]), rest, axis) for p in (model.params, tied))
        np.testing.assert_array_equal(old, new)


@pytest.mark.slow
@pytest.mark.parametrize("weight", [1e-2, 1e-9])
def test_fewer_calibration_tokens_than_channels_leave_numbers_however_little_is_pulled(weight):
    source = dataclasses.replace(tiny.SOURCE, embed=96)
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(size=leaf.shape), jnp.float32),
        models.abstract_params(source),
    )
    target = dataclasses.replace(source, embed=80, tied=True)
    plan = make_plan(tiny.random_scores(source), source, target)
    hidden = np.zeros((30, 96), np.float32)
    hidden[:, plan.embed] = random.normal(size=(30, 80))
    sums = TyingSums(jnp.asarray(1e3 * hidden.T @ hidden), jnp.ones(source.vocab_size))
    tied = tie(plan, params, sums, weight=weight)
    assert np.abs(tied["embedding"]).max() < 100  # NaN is not


@pytest.mark.slow
def test_a_model_that_is_tied_already_but_for_a_gain_comes_out_exactly():
    """U = diag(g) E^T: both ends have one matrix, and the gain goes into the norm."""
    plan, model, batch = problem(embed=12)
    gain = np.linspace(0.5, 2, 12, dtype=np.float32)
    embedding = np.array(model.params["embedding"])
    embedding -= embedding.mean(0)
    params = model.params | {"embedding": embedding, "unembedding": gain[:, None] * embedding.T}
    model = models.Model(model.config, params)
    fit = jax.jit(lambda params, sums: apply_plan(plan, tie(plan, params, sums)))
    tied = fit(params, tying_sums(model, [batch]))
    got = models.logits(plan.target, tied, batch["tokens"][:2])
    want = models.logits(model.config, params, batch["tokens"][:2])
    np.testing.assert_allclose(got, want, atol=2e-3)


@pytest.mark.slow
def test_eight_devices_equal_one():
    source = dataclasses.replace(tiny.SOURCE, embed=16, vocab_size=32)
    target = dataclasses.replace(source, embed=8, tied=True)
    plan = make_plan(tiny.random_scores(source), source, target)
    model, batch = tiny.model(source), tiny.rows(8, vocab_size=32)
    mesh = parallel.make_mesh(parallel.MeshConfig(fsdp=4, tensor=2))
    one, eight = (tying_sums(model, [batch], mesh=some) for some in (None, mesh))
    assert eight.gram.addressable_shards[0].data.shape == (4, 8)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), eight, one)
    first = jit_tie(plan, None)(model.params, one)
    placed = parallel.shardings(mesh, models.logical_axes(source), model.params)
    second = jit_tie(plan, mesh)(jax.device_put(model.params, placed), eight)
    assert second["embedding"].sharding.is_equivalent_to(placed["embedding"], 2)
    np.testing.assert_allclose(second["embedding"], first["embedding"], rtol=1e-2, atol=1e-3)


def test_no_batches():
    with pytest.raises(InputError, match="no calibration batches"):
        tying_sums(tiny.model(), [])
