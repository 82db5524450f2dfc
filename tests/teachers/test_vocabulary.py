import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from distill_jax import teachers
from distill_jax.teachers import vocabulary


def test_log_softmax_and_entropy_bear_impossible_ids():
    logits = np.array([[0.0, 1.0, -np.inf, 3.0], [1e4, -1e4, 0.0, 0.0]], np.float32)
    log_probs = vocabulary.log_softmax(jnp.asarray(logits))
    exact = scipy.special.log_softmax(logits.astype(np.float64), axis=-1)
    np.testing.assert_allclose(log_probs, exact, rtol=1e-6, atol=1e-7)
    expected = scipy.special.entr(np.exp(exact)).sum(axis=-1)
    np.testing.assert_allclose(vocabulary.entropy(log_probs), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_wrong_logits_show_in_the_entropy(wrong):
    logits = jnp.array([[0.0, wrong, 1.0], [0.0, 1.0, 2.0]])
    entropy = np.asarray(vocabulary.entropy(vocabulary.log_softmax(logits)))
    assert np.isnan(entropy).tolist() == [True, False]


def test_log_sum_of_what_is_small_or_nothing():
    values = np.array([[-900.0, -901.0], [-np.inf, -np.inf], [0.0, -np.inf]], np.float32)
    expected = scipy.special.logsumexp(values.astype(np.float64), axis=-1)
    np.testing.assert_allclose(vocabulary.log_sum(jnp.asarray(values)), expected, rtol=1e-6)


def test_a_label_is_below_zero_and_none_is_zero():
    logits = jnp.array([[0.0, 200.0, -np.inf]] * 4)
    found = vocabulary.label_log_prob(vocabulary.log_softmax(logits), jnp.array([0, 1, 2, -1]))
    assert found.tolist() == [-200.0, -(2.0**-24), -np.inf, 0.0]
    assert np.float16(found[1]) < 0


@pytest.mark.parametrize(("ids", "temperature"), [(1.5, 1.0), (10.0, 1.0), (25.0, 2.0)])
def test_threshold_for_a_mean_number_of_ids(ids, temperature):
    logits = 4 * np.random.default_rng(0).standard_normal((20, 500)).astype(np.float32)
    tau = float(teachers.threshold_for(logits, ids, temperature))
    probs = scipy.special.softmax(logits.astype(np.float64) / temperature, axis=-1)
    assert np.minimum(probs / tau, 1).sum(axis=-1).mean() == pytest.approx(ids, rel=1e-5)
