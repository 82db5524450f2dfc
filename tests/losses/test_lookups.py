"""The gradient of sparse objectives through a stand-in for the logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import losses
from distill_jax.losses import lookups, sparse

from . import oracles

N, V, K = 16, 512, 5


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(N, V)) * 3
    teachers = [logits + rng.normal(size=(N, V)) for _ in range(3)]
    labels = rng.integers(0, V, N)
    labels[:4] = np.argmax(teachers[0], -1)[:4]  # also among the ids of others
    listed = [oracles.top_k(teacher, K, 2.0)[0] for teacher in teachers[:2]]
    # Padding: impossible ids that are listed, ids outside the vocabulary.
    listed[0] = losses.TopKTargets(
        listed[0].ids.at[:, -1].set(-1),
        listed[0].log_probs.at[:, -1].set(-jnp.inf),
        jnp.logaddexp(listed[0].log_tail, listed[0].log_probs[:, -1]),
        2.0,
    )
    sampled = oracles.sampled(teachers[2], K + 1, rng)  # ids may come twice
    sampled = losses.SampledTargets(
        sampled.ids.at[:, -1].set(V + 3), sampled.weights.at[:, -1].set(0.0)
    )
    targets = {"labels": labels, "one": listed[0], "two": listed[1], "sampled": sampled}
    where = (rng.uniform(size=N) > 0.3) * rng.uniform(size=N)
    return jnp.asarray(logits, jnp.float32), jax.tree.map(jnp.asarray, targets), jnp.asarray(where)


OBJECTIVE = losses.weighted_sum(
    hard=(0.3, losses.hard_labels(z_loss=1e-2)),
    one=(0.5, losses.distill("one", losses.reverse_kl, temperature=2.0)),
    two=(0.7, losses.distill("two", losses.forward_kl, temperature=2.0)),
    sampled=(0.9, losses.distill("sampled", losses.forward_kl)),
)


def plain(logits_NV, targets):
    """OBJECTIVE in terms of whole distributions."""
    log_q, soft_q = jax.nn.log_softmax(logits_NV), jax.nn.softmax(logits_NV / 2.0)
    rows = jnp.arange(N)
    hard = -log_q[rows, targets["labels"]]
    hard += 1e-2 * jax.nn.logsumexp(logits_NV, axis=-1) ** 2

    def bucketed(teacher):
        valid = jnp.isfinite(teacher.log_probs)
        ids = jnp.where(valid, teacher.ids, 0)
        listed = jnp.zeros((N, V)).at[rows[:, None], ids].max(valid.astype(jnp.float32))
        q = jnp.where(valid, soft_q[rows[:, None], ids], 0.0)
        rest = jnp.sum(soft_q * (1 - listed), axis=-1)
        p = jnp.append(jnp.exp(teacher.log_probs), jnp.exp(teacher.log_tail)[:, None], axis=-1)
        return p, jnp.append(q, rest[:, None], axis=-1)

    def kl(a, b):
        both = (a > 0) & (b > 0)
        return 4.0 * jnp.sum(
            jnp.where(both, a * jnp.log(jnp.where(both, a / jnp.where(both, b, 1.0), 1.0)), 0.0), -1
        )

    p_one, q_one = bucketed(targets["one"])
    p_two, q_two = bucketed(targets["two"])
    weights = targets["sampled"].weights
    drawn = jnp.where(weights > 0, targets["sampled"].ids, 0)
    log_w = jnp.log(jnp.where(weights > 0, weights, 1.0))
    sampled = jnp.sum(weights * (log_w - log_q[rows[:, None], drawn]), axis=-1)
    return 0.3 * hard + 0.5 * kl(q_one, p_one) + 0.7 * kl(p_two, q_two) + 0.9 * sampled


def through(objective, logits, targets, where, dtype=jnp.float32):
    """The loss and its gradient by the logits, and with what the objective was called."""
    kinds = []

    def loss(logits_NV):
        kinds.append(type(logits_NV))
        totals = losses.reduce(*objective(logits_NV, targets), where)
        return totals.loss, totals

    totals, gradient = lookups.result_and_gradient(loss, logits, where, dtype, local=True)
    return totals.loss, gradient, kinds


@pytest.mark.slow
def test_equals_the_gradient_of_whole_distributions():
    logits, targets, where = inputs()
    loss, gradient, kinds = through(OBJECTIVE, logits, targets, where)
    expected, slope = jax.value_and_grad(lambda x: jnp.sum(where * plain(x, targets)))(logits)
    assert kinds == [sparse.Lookups] * 2
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=2e-5, atol=2e-7)


@pytest.mark.slow
def test_is_rounded_once():
    logits, targets, where = inputs(1)
    _, exact, _ = through(OBJECTIVE, logits, targets, where)
    _, rounded, kinds = through(OBJECTIVE, logits, targets, where, jnp.bfloat16)
    assert kinds[-1] is sparse.Lookups
    np.testing.assert_array_equal(rounded, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "total_variation"])
def test_logits_that_leave_nothing_to_sum(divergence):
    """Everything outside the ids is impossible, or far below them."""
    spread, targets, where = inputs(2)
    rows, ids = jnp.arange(N)[:, None], targets["two"].ids
    objective = losses.distill("two", getattr(losses, divergence), temperature=2.0)
    for below in (-jnp.inf, -1e4, -200.0):
        logits = (spread + below).at[rows, ids].set(jnp.arange(float(K)))
        _, gradient, kinds = through(objective, logits, targets, where)
        slope = jax.grad(lambda x: losses.reduce(*objective(x, targets), where).loss)(logits)
        assert kinds[-1] is sparse.Lookups
        np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-7)


def test_masked_tokens_may_hold_nan():
    logits, targets, where = inputs(3)
    where = where.at[2].set(0.0)
    _, expected, _ = through(OBJECTIVE, logits, targets, where)
    spoilt = targets | {
        "sampled": losses.SampledTargets(
            targets["sampled"].ids, targets["sampled"].weights.at[2].set(jnp.nan)
        )
    }
    _, gradient, kinds = through(OBJECTIVE, logits.at[2].set(jnp.nan), spoilt, where)
    assert kinds[-1] is sparse.Lookups
    np.testing.assert_array_equal(gradient, expected)


def squared(logits_NV, targets, *, step=None):
    del targets, step
    return jnp.sum(logits_NV**2, axis=-1) / 2, {}


def compared(logits_NV, targets, *, step=None):
    del step
    below = jnp.sum(jnp.broadcast_to(logits_NV == targets["zero"], logits_NV.shape), axis=-1)
    return losses.cross_entropy(logits_NV, targets["labels"]) * (1 + below), {}


def not_softened(logits_NV, targets, *, step=None):
    del step
    picked, log_z = sparse.pick(logits_NV, targets["labels"][:, None])
    return log_z - picked[:, 0] + 0.01 * log_z**2, {}


def own_temperature(logits_NV, targets, *, step=None):
    del step
    temperature = 1 + 0.1 * jnp.mean(losses.cross_entropy(logits_NV, targets["labels"]))
    softened = sparse.soften(logits_NV, temperature)
    picked, log_z = sparse.pick(softened, targets["labels"][:, None])
    return log_z - picked[:, 0], {}


def mapped(logits_NV, targets, *, step=None):
    del step
    return jax.vmap(losses.cross_entropy)(logits_NV, targets["labels"]), {}


def kl_to(logits_NV):
    return lambda teacher: losses.forward_kl(logits_NV, teacher, temperature=2.0)


def rematerialised(logits_NV, targets, *, step=None):
    del step
    return jax.checkpoint(kl_to(logits_NV))(targets["two"]), {}


def jitted(logits_NV, targets, *, step=None):
    del step
    return jax.jit(kl_to(logits_NV))(targets["two"]), {}


def chosen(logits_NV, targets, *, step=None):
    del step
    kl, other = kl_to(logits_NV), lambda _: losses.cross_entropy(logits_NV, targets["labels"])
    return jax.lax.cond(targets["labels"][0] >= 0, kl, other, targets["two"]), {}


def scanned(logits_NV, targets, *, step=None):
    del step
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), targets["one"], targets["two"])
    kl = kl_to(logits_NV)
    return jax.lax.scan(lambda sum_N, one: (sum_N + kl(one), None), jnp.zeros(N), both)[0], {}


def follows_its_own_lookup(logits_NV, targets, *, step=None):
    """The likeliest of the listed ids is the label."""
    del step
    picked, _ = sparse.pick(sparse.soften(logits_NV), targets["two"].ids)
    best = jnp.take_along_axis(targets["two"].ids, jnp.argmax(picked, -1)[:, None], -1)[:, 0]
    return losses.cross_entropy(logits_NV, best), {}


class Alternating:
    """Another divergence at every call, as state and random numbers of Python's would give."""

    calls = 0

    def __call__(self, logits_NV, targets, *, step=None):
        del step
        self.calls += 1
        if self.calls == 2:
            return losses.cross_entropy(logits_NV, targets["labels"]), {}
        return kl_to(logits_NV)(targets["two"]), {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective",
    [
        squared,
        compared,
        not_softened,
        own_temperature,
        mapped,
        rematerialised,
        jitted,
        chosen,
        scanned,
        follows_its_own_lookup,
        Alternating(),
    ],
)
def test_whatever_an_objective_does_with_logits(objective):
    logits, targets, where = inputs(4)
    logits = logits.at[:, :9].set(0.0)
    targets["zero"], where = jnp.zeros((N, 1)), where + 0.1

    def head(hidden, unembedding):
        return losses.fused_linear(objective, hidden, unembedding, targets, where, chunk=N).loss

    def plain_head(hidden, unembedding):
        return losses.reduce(*objective(hidden @ unembedding, targets), where).loss

    actual = jax.jit(jax.value_and_grad(head))(logits, jnp.eye(V))
    expected = jax.value_and_grad(plain_head)(logits, jnp.eye(V))
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-5, atol=1e-6)


def test_stops_gradients_where_they_are_stopped():
    logits, targets, where = inputs(5)

    def stopped(logits_NV, targets, *, step=None):
        return OBJECTIVE(jax.lax.stop_gradient(logits_NV), targets, step=step)

    _, gradient, _ = through(stopped, logits, targets, where)
    np.testing.assert_array_equal(gradient, jnp.zeros_like(logits))


def test_an_objective_that_fails_says_what_it_says():
    logits, targets, where = inputs()
    with pytest.raises(ValueError, match=r"no targets 'unknown'"):
        through(losses.distill("unknown", losses.forward_kl), logits, targets, where)


@pytest.mark.slow
def test_many_ids_of_a_small_vocabulary_are_not_compared():
    logits, targets, where = inputs()
    small = targets | {"labels": targets["labels"] % 8}
    _, _, kinds = through(losses.hard_labels(), logits[:, :8], small, where)
    assert kinds[-1] is sparse.Lookups  # 1 id of 8
    small["two"] = losses.TopKTargets(small["two"].ids % 8, *jax.tree.leaves(targets["two"])[1:])
    objective = losses.distill("two", losses.forward_kl)
    _, _, kinds = through(objective, logits[:, :8], small, where)
    assert kinds[-1] is not sparse.Lookups  # 5 ids of 8


@pytest.mark.slow
def test_a_scatter_in_the_order_of_tiles():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(24, 384)).astype(np.float32)
    ids = np.stack([rng.choice(384, 7, replace=False) for _ in range(24)])
    updates = rng.normal(size=ids.shape).astype(np.float32)
    expected = values.copy()
    np.put_along_axis(expected, ids[:, 1:], updates[:, 1:], -1)
    ids[:, 0] = 384  # outside: dropped
    actual = lookups._set_in_tiles(*map(jnp.asarray, (values, ids, updates)))
    np.testing.assert_array_equal(actual, expected)
