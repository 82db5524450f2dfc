import chex
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import optax
import pytest
import scipy.special

from distill_jax import losses

N, V = 6, 13


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(N, V)) * 3, jnp.float32), jnp.asarray(rng.integers(0, V, N))


def test_cross_entropy_equals_definition(batch):
    logits, labels = batch
    exact = np.asarray(logits, np.float64)
    log_z = scipy.special.logsumexp(exact, axis=-1)
    picked = exact[np.arange(N), np.asarray(labels)]
    np.testing.assert_allclose(losses.cross_entropy(logits, labels), log_z - picked, rtol=1e-5)
    expected = 0.9 * (log_z - picked) + 0.1 * (log_z - exact.mean(-1)) + 0.01 * log_z**2
    value = losses.cross_entropy(logits, labels, z_loss=0.01, label_smoothing=0.1)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_cross_entropy_equals_optax(batch):
    logits, labels = batch
    smooth = optax.smooth_labels(jax.nn.one_hot(labels, V), 0.2)
    chex.assert_trees_all_close(
        jax.value_and_grad(
            lambda logits: losses.cross_entropy(logits, labels, label_smoothing=0.2).sum()
        )(logits),
        jax.value_and_grad(lambda logits: optax.losses.softmax_cross_entropy(logits, smooth).sum())(
            logits
        ),
        rtol=1e-5,
        atol=1e-6,
    )


def test_numerical_gradients(batch):
    logits, labels = batch

    def loss(logits):
        return losses.cross_entropy(logits, labels, z_loss=0.01, label_smoothing=0.1)

    chex.assert_numerical_grads(loss, (logits,), 1, atol=1e-3, modes=("rev",))
    jax.test_util.check_grads(loss, (logits,), order=1, modes=("rev",), atol=2e-2, rtol=2e-2)


def test_token_log_probs(batch):
    logits, labels = batch
    expected = scipy.special.log_softmax(np.asarray(logits, np.float64), -1)
    expected = expected[np.arange(N), np.asarray(labels)]
    np.testing.assert_allclose(losses.token_log_probs(logits, labels), expected, rtol=1e-5)


def test_extremes(batch):
    _, labels = batch
    logits = jnp.zeros((N, V)).at[:, 0].set(1e4).at[:, 1].set(-1e4).at[:, 2].set(-jnp.inf)
    labels = labels.at[:].set(1)
    loss, slope = jax.value_and_grad(lambda logits: losses.cross_entropy(logits, labels).sum())(
        logits
    )
    np.testing.assert_allclose(loss, N * 2e4, rtol=1e-6)
    expected = np.zeros((N, V))
    expected[:, :2] = [1.0, -1.0]
    np.testing.assert_allclose(slope, expected, atol=1e-6)


def test_bfloat16_is_computed_in_float32(batch):
    logits, labels = batch
    half = logits.astype(jnp.bfloat16)
    value = losses.cross_entropy(half, labels)
    assert value.dtype == jnp.float32
    chex.assert_trees_all_close(value, losses.cross_entropy(half.astype(jnp.float32), labels))


@pytest.mark.parametrize("label", [-100, -1, V])
def test_label_outside_the_vocabulary_spoils_only_its_token(label, batch):
    logits, labels = batch
    value = losses.cross_entropy(logits, labels.at[2].set(label))
    assert bool(jnp.isnan(value[2]))
    chex.assert_trees_all_close(
        jnp.delete(value, 2), jnp.delete(losses.cross_entropy(logits, labels), 2)
    )


def test_what_does_not_fit_is_refused(batch):
    logits, labels = batch
    with pytest.raises(ValueError, match="do not fit"):
        losses.cross_entropy(logits, labels[1:])
    with pytest.raises(ValueError, match="do not fit"):
        losses.token_log_probs(logits, labels[:, None])
    with pytest.raises(ValueError, match="label_smoothing"):
        losses.cross_entropy(logits, labels, label_smoothing=1.0)
