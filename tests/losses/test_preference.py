import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import losses


@pytest.fixture
def log_probs():
    return jnp.asarray(-np.random.default_rng(0).uniform(5, 50, size=(4, 6)), jnp.float32)


def test_dpo_equals_definition(log_probs):
    exact = np.asarray(log_probs, np.float64)
    margin = 0.1 * ((exact[0] - exact[2]) - (exact[1] - exact[3]))
    loss, terms = losses.dpo(*log_probs)
    np.testing.assert_allclose(loss, np.log1p(np.exp(-margin)), rtol=1e-5)
    np.testing.assert_allclose(terms["reward_margin"], margin, rtol=1e-5)
    np.testing.assert_array_equal(terms["reward_accuracy"], margin > 0)


def test_dpo_of_mean_log_probs(log_probs):
    exact = np.asarray(log_probs, np.float64)
    chosen, rejected = np.arange(1, 7), np.arange(12, 6, -1)
    margin = 2.0 * ((exact[0] - exact[2]) / chosen - (exact[1] - exact[3]) / rejected)
    loss, _ = losses.dpo(
        *log_probs,
        beta=2.0,
        chosen_length_B=jnp.asarray(chosen),
        rejected_length_B=jnp.asarray(rejected),
    )
    np.testing.assert_allclose(loss, np.log1p(np.exp(-margin)), rtol=1e-5)


def test_untrained_policy_starts_at_log_two(log_probs):
    chosen, rejected = log_probs[:2]
    loss, terms = losses.dpo(chosen, rejected, chosen, rejected)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    np.testing.assert_array_equal(terms["reward_margin"], 0.0)


def test_gradients(log_probs):
    chex.assert_numerical_grads(
        lambda chosen, rejected: losses.dpo(chosen, rejected, *log_probs[2:])[0],
        (log_probs[0], log_probs[1]),
        1,
        atol=1e-3,
    )
    slopes = jax.grad(lambda *all_four: losses.dpo(*all_four)[0].sum(), argnums=(0, 1, 2, 3))(
        *log_probs
    )
    loss, terms = losses.dpo(*log_probs)
    expected = -0.1 * jax.nn.sigmoid(-terms["reward_margin"])
    chex.assert_trees_all_close(slopes[0], expected, rtol=1e-5)
    chex.assert_trees_all_close(slopes[1], -expected, rtol=1e-5)
    np.testing.assert_array_equal(slopes[2], 0.0)
    np.testing.assert_array_equal(slopes[3], 0.0)
    assert loss.shape == (6,)


def test_extremes_are_finite():
    far = jnp.asarray([1e4, -1e4])
    zero = jnp.zeros(2)
    loss, slope = jax.value_and_grad(
        lambda chosen: losses.dpo(chosen, zero, zero, zero, beta=1.0)[0].sum()
    )(far)
    np.testing.assert_allclose(loss, 1e4, rtol=1e-6)
    np.testing.assert_allclose(slope, [0.0, -1.0], atol=1e-6)


def test_what_does_not_fit_is_refused(log_probs):
    chosen, rejected, *reference = log_probs
    with pytest.raises(ValueError, match="differ in shape"):
        losses.dpo(chosen[1:], rejected, *reference)
    with pytest.raises(ValueError, match="both chosen_length_B and rejected_length_B"):
        losses.dpo(chosen, rejected, *reference, chosen_length_B=chosen)
