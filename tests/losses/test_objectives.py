import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import losses

N, V = 5, 7


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    student, small, large = jnp.asarray(rng.normal(size=(3, N, V)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, V, N))
    return student, {"labels": labels, "8b": small, "70b": large}


def test_weighted_sum_of_hard_labels_and_two_teachers(batch):
    student, targets = batch
    objective = losses.weighted_sum(
        hard=(0.1, losses.hard_labels(z_loss=1e-2)),
        small=(0.45, losses.distill("8b", losses.jensen_shannon, beta=0.2)),
        large=(0.45, losses.distill("70b", losses.forward_kl, temperature=2.0)),
    )
    loss, terms = objective(student, targets)
    hard = losses.cross_entropy(student, targets["labels"], z_loss=1e-2)
    small = losses.jensen_shannon(student, targets["8b"], beta=0.2)
    large = losses.forward_kl(student, targets["70b"], temperature=2.0)
    chex.assert_trees_all_close(loss, 0.1 * hard + 0.45 * small + 0.45 * large, rtol=1e-6)
    plain = losses.cross_entropy(student, targets["labels"])
    chex.assert_trees_all_close(
        terms, {"hard": hard, "hard/cross_entropy": plain, "small": small, "large": large}
    )


def test_weight_follows_a_schedule_of_the_step(batch):
    student, targets = batch
    objective = losses.weighted_sum(
        hard=(1.0, losses.hard_labels()),
        soft=(lambda step: step / 10, losses.distill("8b", losses.forward_kl)),
    )
    run = jax.jit(lambda step: objective(student, targets, step=step)[0])
    hard, soft = (
        losses.cross_entropy(student, targets["labels"]),
        losses.forward_kl(student, targets["8b"]),
    )
    for step in (0, 4):
        chex.assert_trees_all_close(run(jnp.asarray(step)), hard + step / 10 * soft, rtol=1e-6)
    with pytest.raises(ValueError, match="'soft' follows a schedule: pass step"):
        objective(student, targets)


def test_sums_nest(batch):
    student, targets = batch
    inner = losses.weighted_sum(soft=(2.0, losses.distill("8b", losses.forward_kl)))
    loss, terms = losses.weighted_sum(both=(3.0, inner))(student, targets)
    chex.assert_trees_all_close(loss, 6.0 * losses.forward_kl(student, targets["8b"]), rtol=1e-6)
    assert sorted(terms) == ["both", "both/soft"]


def test_taid_moves_from_the_student_to_the_teacher(batch):
    student, targets = batch
    objective = losses.taid("8b", lambda step: step / 100)
    start, middle, end = (objective(student, targets, step=step)[0] for step in (0, 50, 100))
    np.testing.assert_allclose(start, 0.0, atol=1e-6)
    chex.assert_trees_all_close(end, losses.forward_kl(student, targets["8b"]), rtol=1e-5)
    assert bool(jnp.all((start < middle) & (middle < end)))
    slope = jax.grad(lambda student: objective(student, targets, step=50)[0].sum())(student)
    moving = jax.nn.softmax((student + targets["8b"]) / 2)
    chex.assert_trees_all_close(slope, jax.nn.softmax(student) - moving, atol=1e-6)
    tokens = jnp.zeros((N, 1))
    with pytest.raises(TypeError, match="needs the logits of '8b', got SampledTargets"):
        objective(student, {"8b": losses.SampledTargets(tokens, tokens)}, step=1)


def test_missing_targets_are_named(batch):
    student, targets = batch
    with pytest.raises(ValueError, match="no targets '405b'; there are 70b, 8b, labels"):
        losses.distill("405b", losses.forward_kl)(student, targets)
    with pytest.raises(ValueError, match="no targets 'labels'; there are none"):
        losses.hard_labels()(student, {})
    with pytest.raises(ValueError, match="at least one"):
        losses.weighted_sum()
