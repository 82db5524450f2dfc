"""Stored targets: samples without bias, padding slots, ids of any width."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import losses

from . import oracles
from .test_divergences import V, gradient, logits, value_and_gradient

__all__ = ["logits"]  # a fixture


def test_sampled_value_is_written_with_weights(logits):
    student, teacher = logits
    targets = oracles.sampled(teacher, 7, np.random.default_rng(1), 2.0)
    log_q = np.log(np.take_along_axis(oracles.softmax(student, 2.0), np.asarray(targets.ids), -1))
    expected = 4.0 * np.sum(np.log(1 / 7) / 7 - log_q / 7, -1)
    value = losses.forward_kl(student, targets, temperature=2.0)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_sampled_gradient_is_unbiased_over_redraws(logits):
    student, teacher = logits[0][:2], logits[1][:2]
    rng = np.random.default_rng(2)
    redraws = 4000
    many = oracles.sampled(jnp.broadcast_to(teacher, (redraws, 2, V)), 5, rng)
    gradients = np.asarray(
        gradient(losses.forward_kl, jnp.broadcast_to(student, (redraws, 2, V)), many)
    )
    exact = oracles.softmax(student) - oracles.softmax(teacher)
    error = gradients.std(0) / np.sqrt(redraws) + 1e-6
    assert np.all(np.abs(gradients.mean(0) - exact) < 5 * error)
    assert np.abs(gradients[0] - exact).max() > 0.05  # a single draw is far off
    np.testing.assert_allclose(gradients.sum(-1), 0.0, atol=1e-5)


def test_sampled_padding_changes_nothing(logits):
    student, teacher = logits
    targets = oracles.sampled(teacher, 4, np.random.default_rng(3))
    pad = ((0, 0), (0, 3))
    padded = losses.SampledTargets(
        jnp.pad(targets.ids, pad, constant_values=-1), jnp.pad(targets.weights, pad)
    )
    chex.assert_trees_all_close(
        value_and_gradient(losses.forward_kl, student, padded),
        value_and_gradient(losses.forward_kl, student, targets),
        atol=1e-6,
    )


def test_targets_are_trees_with_their_temperature_as_metadata(logits):
    targets, _ = oracles.top_k(logits[1], 4, 2.0)
    leaves, structure = jax.tree.flatten(targets)
    assert len(leaves) == 3
    assert jax.tree.unflatten(structure, leaves).temperature == 2.0
    with pytest.raises(ValueError, match="stored at temperature"):
        jax.jit(losses.forward_kl)(logits[0], targets)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16, jnp.uint16])
def test_ids_of_any_integer_type_are_understood(dtype):
    rng = np.random.default_rng(6)
    student = jnp.asarray(rng.normal(size=(3, 300)), jnp.float32)
    targets = losses.TopKTargets(
        jnp.asarray([[1, 5, 0]] * 3),
        jnp.log(jnp.asarray([[0.5, 0.2, 0.0]] * 3)),
        jnp.log(jnp.full(3, 0.3)),
    )
    narrow = dataclasses.replace(targets, ids=targets.ids.astype(dtype))
    for function in (losses.forward_kl, losses.reverse_kl):
        chex.assert_trees_all_equal(
            value_and_gradient(function, student, narrow),
            value_and_gradient(function, student, targets),
        )
    if jnp.iinfo(dtype).min < 0:
        labels = jnp.asarray([3, -100, 7], dtype)
        np.testing.assert_array_equal(
            jnp.isnan(losses.cross_entropy(student, labels)), [False, True, False]
        )
    with pytest.raises(TypeError, match="must be integers, got float32"):
        losses.cross_entropy(student, jnp.zeros(3))


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "total_variation"])
def test_padding_slots_change_nothing(name, logits):
    student, teacher = logits
    targets, _ = oracles.top_k(teacher, 4)
    filler = jnp.broadcast_to(jnp.asarray([0, -1, V + 5]), (6, 3))
    padded = losses.TopKTargets(
        jnp.concatenate([targets.ids, filler], axis=-1),
        jnp.pad(targets.log_probs, ((0, 0), (0, 3)), constant_values=-jnp.inf),
        targets.log_tail,
    )
    function = oracles.loss(name)
    chex.assert_trees_all_close(
        value_and_gradient(function, student, padded),
        value_and_gradient(function, student, targets),
        atol=1e-6,
    )
