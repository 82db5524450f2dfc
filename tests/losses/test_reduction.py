import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import losses


@pytest.fixture
def tokens():
    rng = np.random.default_rng(0)
    loss, term = jnp.asarray(rng.normal(size=(2, 10)), jnp.float32)
    where = jnp.asarray(rng.uniform(size=10) > 0.4)
    return loss, {"term": term}, where


def test_masked_equals_subset(tokens):
    loss, terms, where = tokens
    kept = np.asarray(where)
    mean, term_means = losses.reduce(loss, terms, where).mean()
    np.testing.assert_allclose(mean, np.asarray(loss)[kept].mean(), rtol=1e-6)
    np.testing.assert_allclose(
        term_means["term"], np.asarray(terms["term"])[kept].mean(), rtol=1e-6
    )
    chex.assert_trees_all_close(
        losses.reduce(loss, terms, where),
        losses.reduce(loss[where], {"term": terms["term"][where]}),
        rtol=1e-6,
    )


def test_weights(tokens):
    loss, terms, _ = tokens
    weights = np.linspace(0, 2, 10)
    mean, _ = losses.reduce(loss, terms, jnp.asarray(weights)).mean()
    np.testing.assert_allclose(mean, np.average(loss, weights=weights), rtol=1e-5)


def test_masked_nan_changes_neither_value_nor_gradient(tokens):
    loss, terms, where = tokens

    def mean(loss):
        return losses.reduce(jnp.sqrt(loss), terms, where).mean()[0]

    loss = jnp.abs(loss) + 0.1
    spoilt = jnp.where(where, loss, jnp.nan)
    chex.assert_trees_all_equal(mean(spoilt), mean(loss))
    slope = jax.grad(lambda loss: losses.reduce(loss, terms, where).loss)(spoilt)
    np.testing.assert_array_equal(slope, where.astype(jnp.float32))


def test_sums_of_uneven_parts_give_the_mean_of_the_whole(tokens):
    loss, terms, where = tokens
    parts = [
        losses.reduce(loss[cut], {"term": terms["term"][cut]}, where[cut])
        for cut in (slice(0, 1), slice(1, 7), slice(7, 10))
    ]
    whole = losses.reduce(loss, terms, where)
    chex.assert_trees_all_close((parts[0] + parts[1] + parts[2]).mean(), whole.mean(), rtol=1e-6)


def test_only_the_loss_carries_a_gradient(tokens):
    loss, terms, where = tokens

    def total(loss, terms, where):
        totals = losses.reduce(loss, terms, where)
        return totals.loss + 5 * totals.terms["term"] + totals.weight

    slopes = jax.grad(total, argnums=(0, 1, 2))(loss, terms, where.astype(jnp.float32))
    np.testing.assert_array_equal(slopes[0], where.astype(jnp.float32))
    np.testing.assert_array_equal(slopes[1]["term"], 0.0)
    np.testing.assert_array_equal(slopes[2], 0.0)


def test_no_weight_gives_zero_mean(tokens):
    loss, terms, where = tokens
    mean, term_means = losses.reduce(loss, terms, jnp.zeros_like(where)).mean()
    assert (mean, term_means["term"]) == (0.0, 0.0)


def test_bfloat16_adds_up_in_float32():
    total = losses.reduce(jnp.full(2048, 1.0, jnp.bfloat16), {})
    assert total.loss.dtype == jnp.float32
    assert (total.loss, total.weight) == (2048.0, 2048.0)


def test_what_does_not_fit_is_refused(tokens):
    loss, terms, where = tokens
    with pytest.raises(ValueError, match="where has shape"):
        losses.reduce(loss, terms, where[:, None])
    with pytest.raises(ValueError, match="term has shape"):
        losses.reduce(loss[1:], terms, where[1:])
    with pytest.raises(ValueError, match="different terms"):
        losses.reduce(loss, terms) + losses.reduce(loss, {})
    with pytest.raises(TypeError):
        losses.reduce(loss, terms) + 1.0
