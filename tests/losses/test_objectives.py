import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import losses
from distill_jax.losses import objectives

from . import oracles

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


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(oracles.DIVERGENCES))
def test_temperature_follows_a_schedule_of_the_step(name, batch):
    student, targets = batch
    objective = losses.distill("8b", oracles.loss(name), temperature=lambda step: 4 - step / 10)

    def loss(student, step):
        return objective(student, targets, step=step)[0]

    run = jax.jit(lambda *args: jax.vjp(loss, *args)[0])
    slope = jax.jit(jax.grad(lambda *args: loss(*args).sum()))
    for step, temperature in ((0.0, 4.0), (15.0, 2.5)):
        teacher, other = (oracles.softmax(side, temperature) for side in (targets["8b"], student))
        expected = temperature**2 * oracles.divergence(name, teacher, other)
        np.testing.assert_allclose(run(student, step), expected, rtol=2e-5, atol=2e-6)
        fixed = losses.distill("8b", oracles.loss(name), temperature=temperature)
        chex.assert_trees_all_close(
            slope(student, step),
            jax.grad(lambda student, fixed=fixed: fixed(student, targets)[0].sum())(student),
            atol=1e-5,
        )
    with pytest.raises(ValueError, match="'8b' follows a schedule: pass step"):
        objective(student, targets)


def test_a_schedule_reaches_the_fused_head(batch):
    _, targets = batch
    rng = np.random.default_rng(1)
    hidden, unembedding = rng.normal(size=(N, 3)), rng.normal(size=(3, V))
    where = jnp.asarray([1.0, 0.0, 0.5, 1.0, 1.0])
    objective = losses.distill("70b", losses.reverse_kl, temperature=lambda step: 1 + step)

    @jax.jit
    def fused(hidden, unembedding, step):
        return losses.fused_linear(
            objective, hidden, unembedding, targets, where, step=step, chunk=2
        ).mean()[0]

    p, q = oracles.softmax(targets["70b"], 3.0), oracles.softmax(hidden @ unembedding, 3.0)
    expected = np.average(9.0 * oracles.kl(q, p), weights=where)
    arrays = jnp.asarray(hidden, jnp.float32), jnp.asarray(unembedding, jnp.float32)
    np.testing.assert_allclose(fused(*arrays, 2), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", [losses.TopKTargets, losses.SampledTargets])
@pytest.mark.parametrize("step", [None, 0])
def test_stored_targets_serve_no_schedule_of_temperatures(kind, step, batch):
    """Not even one that happens to give their own temperature."""
    student, _ = batch
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(N, V))
    stored = (
        oracles.top_k(logits, 3)[0]
        if kind is losses.TopKTargets
        else oracles.sampled(logits, 3, rng)
    )
    objective = losses.distill("8b", losses.forward_kl, temperature=lambda step: 1.0)
    message = (
        rf"^{kind.__name__} of '8b', stored at temperature 1.0, cannot serve a schedule of "
        r"temperatures: use that number, or the teacher's logits"
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: objective(x, {"8b": stored}, step=step), student)
    # A divergence says so itself where it is given a traced temperature.
    with pytest.raises(ValueError, match=r"stored at temperature 1\.0 cannot serve"):
        jax.eval_shape(lambda t: losses.forward_kl(student, stored, temperature=t), 1.0)


def test_token_weights_multiply_the_loss_and_leave_the_terms(batch):
    student, targets = batch
    weights = jnp.asarray([0.0, 0.5, 1.0, 2.0, 0.25])
    objective = losses.weighted_sum(
        hard=(2.0, losses.hard_labels(z_loss=1e-2)),
        soft=(0.5, losses.distill("8b", losses.forward_kl)),
    )
    loss, terms = objective(student, targets)
    weighted, weighted_terms = objectives.token_weighted(objective, lambda _: weights)(
        student, targets
    )
    np.testing.assert_allclose(weighted, np.asarray(weights) * np.asarray(loss), rtol=1e-6)
    plain = {f"unweighted/{name}": term for name, term in terms.items()}
    chex.assert_trees_all_close(
        weighted_terms, {"token_weight": weights, "unweighted": loss, **plain}
    )


def test_token_weights_have_no_gradient(batch):
    student, targets = batch

    def loss(student, labels_weight, teacher):
        objective = objectives.token_weighted(
            losses.hard_labels(), lambda targets: labels_weight * targets["8b"][:, 0]
        )
        return objective(student, {**targets, "8b": teacher})[0].sum()

    slopes = jax.grad(loss, argnums=(0, 1, 2))(student, 3.0, targets["8b"])
    onehot = np.eye(V)[np.asarray(targets["labels"])]
    weights = 3.0 * np.asarray(targets["8b"])[:, :1]
    np.testing.assert_allclose(slopes[0], weights * (oracles.softmax(student) - onehot), atol=1e-5)
    np.testing.assert_array_equal(slopes[1], 0.0)
    np.testing.assert_array_equal(slopes[2], 0.0)


def test_token_weights_of_another_shape_are_refused(batch):
    student, targets = batch
    objective = objectives.token_weighted(losses.hard_labels(), lambda targets: targets["8b"])
    with pytest.raises(ValueError, match=r"token weights \(5, 7\) do not fit a loss \(5,\)"):
        objective(student, targets)
    objective = objectives.token_weighted(losses.hard_labels(), lambda targets: 1.0)
    with pytest.raises(ValueError, match=r"token weights \(\) do not fit"):
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
    cooling = losses.taid("8b", 1.0, temperature=lambda step: step / 50)
    chex.assert_trees_all_close(
        jax.jit(lambda step: cooling(student, targets, step=step)[0])(100),
        losses.forward_kl(student, targets["8b"], temperature=2.0),
        rtol=1e-5,
    )
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


def test_a_weight_of_zero_adds_nothing_not_even_nan(batch):
    student, targets = batch
    ruled_out = student.at[jnp.arange(N), targets["labels"]].set(-jnp.inf)
    objective = losses.weighted_sum(
        hard=(0, losses.hard_labels()), soft=(1.0, losses.distill("8b", losses.forward_kl))
    )
    loss, terms = objective(ruled_out, targets)
    assert bool(jnp.all(jnp.isinf(terms["hard"])))
    chex.assert_trees_all_equal(loss, losses.forward_kl(ruled_out, targets["8b"]))
