"""MiniLLM against the exact gradient of the reverse KL of whole completions, all enumerated."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from distill_jax.losses import divergences, fused, objectives, policy, reduction

from . import oracles

V, END = 3, 2
PREFIXES = [prefix for n in range(3) for prefix in itertools.product(range(END), repeat=n)]
NAN = float("nan")


def completions(horizon):
    """Tokens, prefixes and mask [B, T] of everything that ends, or is cut off at the horizon."""
    every = [
        sequence
        for n in range(1, horizon + 1)
        for sequence in itertools.product(range(V), repeat=n)
        if END not in sequence[:-1] and (n == horizon or sequence[-1] == END)
    ]
    where = np.asarray([[t < len(sequence) for t in range(horizon)] for sequence in every])
    tokens = np.full(where.shape, 10 * V)  # padding is no token of the vocabulary
    prefixes = np.zeros(where.shape, int)
    for row, sequence in enumerate(every):
        tokens[row, : len(sequence)] = sequence
        prefixes[row, : len(sequence)] = [
            PREFIXES.index(sequence[:t]) for t in range(len(sequence))
        ]
    return tokens, prefixes, where


def scored(table, tokens, prefixes, where):
    """Log-probabilities of tokens [B, T] in float64; padding holds NaN."""
    log_probs = scipy.special.log_softmax(table, axis=-1)
    return np.where(where, log_probs[prefixes, np.where(where, tokens, 0)], NAN)


def sequence_kl(student, teacher, horizon):
    """KL(q || p) between distributions of whole completions, by its definition."""
    batch = completions(horizon)
    log_q, log_p = (np.nansum(scored(table, *batch), axis=-1) for table in (student, teacher))
    np.testing.assert_allclose(np.exp(log_q).sum(), 1.0)
    return np.sum(np.exp(log_q) * (log_q - log_p))


def exact_gradient(student, teacher, horizon, step=1e-5):
    slopes = np.zeros_like(student)
    for index in np.ndindex(*student.shape):
        shift = np.zeros_like(student)
        shift[index] = step
        up, down = (sequence_kl(student + s * shift, teacher, horizon) for s in (1, -1))
        slopes[index] = (up - down) / (2 * step)
    return slopes


def expected_gradient(student, teacher, horizon, *, teacher_share=0.0, whole_sequence=True, head):
    """Of the surrogate over all completions, each as often as the sampler draws it."""
    tokens, prefixes, where = completions(horizon)
    student_BT, teacher_BT = (
        jnp.asarray(scored(table, tokens, prefixes, where), jnp.float32)
        for table in (student, teacher)
    )
    where_BT = jnp.asarray(where)
    sampler_BT = policy.mix_log_probs(student_BT, teacher_BT, teacher_share=teacher_share)
    drawn_B = np.exp(np.nansum(np.asarray(sampler_BT, np.float64), axis=-1))
    np.testing.assert_allclose(drawn_B.sum(), 1.0, rtol=1e-6)
    targets = {
        "labels": jnp.asarray(tokens),
        "old_log_probs": student_BT,
        "weights": policy.importance_weights(
            student_BT, sampler_BT, where_BT, whole_sequence=whole_sequence
        ),
        "advantages": policy.minillm_advantages(
            student_BT,
            teacher_BT,
            where_BT,
            reward_clip=np.inf,
            length_normalize=False,
            whitening=False,
        ),
        "teacher": jnp.asarray(np.where(where[..., None], teacher[prefixes], NAN), jnp.float32),
    }
    frequency_BT = jnp.asarray(where * drawn_B[:, None], jnp.float32)
    objective = policy.minillm("teacher")

    def whole(table):
        logits = jnp.where(where_BT[..., None], table[prefixes], NAN)
        return reduction.reduce(*objective(logits, targets), frequency_BT).loss

    def chunked(table):
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), targets)
        hidden = jax.nn.one_hot(prefixes.reshape(-1), len(PREFIXES))
        return fused.fused_linear(
            objective, hidden, table, flat, frequency_BT.reshape(-1), chunk=7
        ).loss

    return jax.jit(jax.grad({"whole": whole, "chunked": chunked}[head]))(
        jnp.asarray(student, jnp.float32)
    )


@pytest.fixture
def tables():
    return np.random.default_rng(0).normal(size=(2, len(PREFIXES), V)) * 1.5


@pytest.mark.parametrize("head", ["whole", "chunked"])
@pytest.mark.parametrize("teacher_share", [0.0, 0.2])
def test_expected_gradient_is_that_of_the_sequence_level_reverse_kl(teacher_share, head, tables):
    expected = exact_gradient(*tables, 3)
    assert np.abs(expected).min() > 1e-4  # every parameter matters
    slopes = expected_gradient(*tables, 3, teacher_share=teacher_share, head=head)
    np.testing.assert_allclose(slopes, expected, rtol=1e-4, atol=2e-6)


@pytest.mark.slow
def test_single_step_term_alone_is_not_that_gradient(tables):
    """Else the enumeration would not see the long-horizon term."""
    tokens, prefixes, where = completions(3)
    drawn_B = np.exp(np.nansum(scored(tables[0], tokens, prefixes, where), axis=-1))
    student, teacher = jnp.asarray(tables, jnp.float32)

    def single_step(table):
        kl = divergences.reverse_kl(table[prefixes], teacher[prefixes])
        return reduction.reduce(kl, {}, jnp.asarray(where * drawn_B[:, None])).loss

    gap = np.abs(jax.grad(single_step)(student) - exact_gradient(*tables, 3)).max()
    assert gap > 0.05


def test_weights_of_single_tokens_are_exact_for_single_tokens_only(tables):
    for horizon, low, high in ((1, 0.0, 1e-5), (3, 1e-3, 1.0)):
        exact = exact_gradient(*tables, horizon)
        slopes = expected_gradient(
            *tables, horizon, teacher_share=0.2, whole_sequence=False, head="whole"
        )
        assert low <= np.abs(slopes - exact).max() <= high


def test_mixed_sampler_is_the_mixture():
    rng = np.random.default_rng(1)
    student, teacher = rng.normal(size=(2, 4, 5)) * 3
    student[0, 0] = teacher[0, 0] = teacher[1, 1] = -np.inf
    q, p = oracles.softmax(student), oracles.softmax(teacher)
    log_q, log_p = jax.nn.log_softmax(jnp.asarray([student, teacher], jnp.float32))
    np.testing.assert_allclose(
        jnp.exp(policy.mix_log_probs(log_q, log_p, teacher_share=0.3)), 0.3 * p + 0.7 * q, rtol=1e-5
    )
    np.testing.assert_array_equal(policy.mix_log_probs(log_q, log_p, teacher_share=0.0), log_q)


def test_importance_weights_by_hand():
    student = jnp.log(jnp.asarray([[0.5, 0.2, NAN], [NAN, 0.9, 0.1]]))
    sampler = jnp.log(jnp.asarray([[0.25, 0.4, 0.1], [0.3, 0.3, 0.4]]))
    where = jnp.asarray([[1, 1, 0], [0, 1, 1]])
    np.testing.assert_allclose(
        policy.importance_weights(student, sampler, where), [[2, 0.5, 0], [0, 3, 0.25]], rtol=1e-6
    )
    np.testing.assert_allclose(
        policy.importance_weights(student, sampler, where, whole_sequence=True),
        [[1, 1, 0], [0, 0.75, 0.75]],
        rtol=1e-6,
    )
    np.testing.assert_array_equal(policy.importance_weights(student, student, where), where)


def test_token_weights_are_bounded_by_the_students_share():
    log_q, log_p = jnp.zeros((1, 3)), jnp.full((1, 3), -1e4)
    mixed = policy.mix_log_probs(log_q, log_p, teacher_share=0.2)
    np.testing.assert_allclose(
        policy.importance_weights(log_q, mixed, jnp.ones((1, 3))), 1.25, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("where", "sums", "means"),
    [
        ([1, 1, 1, 0], [6, 4, 0, 0], [3, 4, 0, 0]),
        ([1, 0, 1, 1], [12, 0, 8, 0], [6, 0, 8, 0]),
        ([0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]),
    ],
)
def test_returns_to_go_by_hand(where, sums, means):
    rewards = jnp.where(jnp.asarray([where]) == 1, jnp.asarray([[1.0, 2.0, 4.0, 8.0]]), NAN)
    where = jnp.asarray([where], bool)
    np.testing.assert_array_equal(
        policy.returns_to_go(rewards, where, length_normalize=False), [sums]
    )
    np.testing.assert_array_equal(policy.returns_to_go(rewards, where), [means])


@pytest.mark.parametrize("dtype", [bool, np.float32])
def test_advantages_equal_definition_and_padding_changes_nothing(dtype):
    rng = np.random.default_rng(2)
    lengths = [4, 1, 3]
    where = (np.arange(6) < np.asarray(lengths)[:, None]).astype(dtype)
    student, teacher = -rng.uniform(0, 6, size=(2, 3, 6))
    assert (np.abs(teacher - student)[where != 0] > 1.4).sum() > 2
    expected = []
    for row, length in enumerate(lengths):
        rewards = np.clip(teacher[row, :length] - student[row, :length], -1.4, 1.4)
        for t in range(length):
            expected.append(rewards[t + 1 :].mean() if t + 1 < length else 0.0)
    expected = (np.asarray(expected) - np.mean(expected)) / np.std(expected)
    holes = [np.where(where, side, NAN) for side in (student, teacher)]
    advantages = policy.minillm_advantages(
        *jnp.asarray(holes, jnp.float32), jnp.asarray(where), reward_clip=1.4
    )
    np.testing.assert_allclose(advantages[where != 0], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(advantages[where == 0], 0.0)


def test_whitening_of_nothing_and_of_equals_is_zero():
    ones = jnp.ones((2, 3))
    np.testing.assert_array_equal(policy.whiten(ones * NAN, jnp.zeros((2, 3))), 0.0)
    np.testing.assert_array_equal(policy.whiten(ones * 7, ones), 0.0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (0.5, 2.0, -1.0, -1.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),
        (0.5, -2.0, 1.6, 0.0),
        (0.9, -2.0, 1.8, 1.8),
        (1.5, -2.0, 3.0, 3.0),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_clip_by_hand(ratio, advantage, loss, slope):
    """A slope is that of the log-probability: -ratio A, or nothing where the clip holds."""

    def surrogate(log_prob, old, advantage):
        return policy.clipped_surrogate(log_prob, old, advantage, clip=0.2)

    arguments = jnp.log(ratio * 0.3), jnp.log(0.3), jnp.asarray(advantage)
    value, terms = surrogate(*arguments)
    slopes = jax.grad(lambda *a: surrogate(*a)[0], argnums=(0, 1, 2))(*arguments)
    np.testing.assert_allclose(value, loss, rtol=1e-5)
    np.testing.assert_allclose(slopes, [slope, 0.0, 0.0], rtol=1e-5)
    np.testing.assert_allclose(terms["ratio"], ratio, rtol=1e-5)
    assert terms["clipped"] == (slope == 0 and advantage != 0)


def test_surrogate_is_finite_at_extremes():
    log_probs, old = jnp.asarray([0.0, 0.0, -1e4, -jnp.inf]), jnp.asarray([-1e4, -1e4, 0.0, 0.0])
    advantages = jnp.asarray([-1.0, 0.0, 1.0, -1.0])
    value, slope = jax.value_and_grad(
        lambda log_probs: policy.clipped_surrogate(log_probs, old, advantages)[0].sum()
    )(log_probs)
    assert np.isfinite(value)
    assert np.isfinite(slope).all()


@pytest.fixture
def rollout():
    """Logits [N, V] and targets of six tokens, some steps after the sampling."""
    rng = np.random.default_rng(3)
    logits, teacher = jnp.asarray(rng.normal(size=(2, 6, 5)), jnp.float32)
    targets = {
        "labels": jnp.asarray(rng.integers(0, 5, 6)),
        "old_log_probs": jnp.asarray(-rng.uniform(1, 2, 6), jnp.float32),
        "advantages": jnp.asarray(rng.normal(size=6), jnp.float32),
        "weights": jnp.asarray(rng.uniform(0.5, 1.2, 6), jnp.float32),
        "8b": teacher,
    }
    return logits, targets


def test_minillm_equals_definition(rollout):
    logits, targets = rollout
    exact = {name: np.asarray(values, np.float64) for name, values in targets.items()}
    q, p = oracles.softmax(logits), oracles.softmax(targets["8b"])
    ratio = q[np.arange(6), targets["labels"]] / np.exp(exact["old_log_probs"])
    gain = np.minimum(ratio * exact["advantages"], np.clip(ratio, 0.7, 1.3) * exact["advantages"])
    loss, terms = policy.minillm("8b", clip=0.3)(logits, targets)
    np.testing.assert_allclose(loss, exact["weights"] * (oracles.kl(q, p) - gain), rtol=1e-5)
    np.testing.assert_allclose(terms["single_step"], oracles.kl(q, p), rtol=1e-5)
    np.testing.assert_allclose(terms["ratio"], ratio, rtol=1e-5)
    np.testing.assert_array_equal(terms["clipped"], gain < ratio * exact["advantages"])
    assert 0 < terms["clipped"].sum() < 6


def test_masked_tokens_change_nothing(rollout):
    logits, targets = rollout
    where = jnp.asarray([1, 1, 0, 1, 0, 1], bool)
    kept = np.flatnonzero(where)
    weights = jnp.where(where, targets["weights"], 0.0)
    spoilt = {
        name: jnp.where(where.reshape(-1, *[1] * (values.ndim - 1)), values, NAN)
        for name, values in targets.items()
    }
    spoilt |= {"weights": weights, "labels": jnp.where(where, targets["labels"], -100)}

    def total(logits, targets, where=None):
        totals = reduction.reduce(*policy.minillm("8b")(logits, targets), where)
        return totals.loss, totals

    grad = jax.jit(jax.grad(total, has_aux=True))
    slopes, totals = grad(jnp.where(where[:, None], logits, NAN), spoilt, where)
    subset_slopes, subset = grad(
        logits[kept], {name: values[kept] for name, values in targets.items()}
    )
    np.testing.assert_allclose(slopes[kept], subset_slopes, rtol=1e-6)
    np.testing.assert_array_equal(np.delete(slopes, kept, axis=0), 0.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), totals, subset)


@pytest.mark.slow
def test_only_the_logits_get_a_gradient(rollout):
    logits, targets = rollout
    floats = {name: values for name, values in targets.items() if name != "labels"}

    def loss(floats):
        return policy.minillm("8b")(logits, targets | floats)[0].sum()

    def prepared(student, teacher):
        where = jnp.ones(student.shape)
        mixed = policy.mix_log_probs(student, teacher)
        weights = policy.importance_weights(student, mixed, where)
        return mixed, weights, policy.minillm_advantages(student, teacher, where)

    sides = -jnp.asarray(np.random.default_rng(4).uniform(1, 3, size=(2, 2, 4)), jnp.float32)
    slopes = jax.grad(loss)(floats), jax.jacrev(prepared, argnums=(0, 1))(*sides)
    jax.tree.map(lambda slope: np.testing.assert_array_equal(slope, 0), slopes)


def trl_generalized_jsd(student, teacher, beta, temperature):
    """TRL's `generalized_jsd_loss` per token: beta is the teacher's share, ends are plain KLs."""
    q, p = oracles.softmax(student, temperature), oracles.softmax(teacher, temperature)
    if beta == 0:
        return oracles.kl(p, q)
    if beta == 1:
        return oracles.kl(q, p)
    mixture = beta * p + (1 - beta) * q
    return beta * oracles.kl(p, mixture) + (1 - beta) * oracles.kl(q, mixture)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("beta", [0, 0.0, 0.1, 0.5, 0.9, 1.0])
def test_gkd_on_completions_equals_trls_formula(beta, temperature):
    rng = np.random.default_rng(5)
    student, teacher = rng.normal(size=(2, 3, 4, 7)) * 2
    where = np.arange(4) < np.asarray([4, 1, 2])[:, None]
    expected = trl_generalized_jsd(student[where], teacher[where], beta, temperature)
    sides = [
        jnp.asarray(np.where(where[..., None], side, NAN), jnp.float32)
        for side in (student, teacher)
    ]
    objective = objectives.distill("8b", policy.gkd, beta=beta, temperature=temperature)
    totals = reduction.reduce(*objective(sides[0], {"8b": sides[1]}), jnp.asarray(where))
    np.testing.assert_allclose(totals.mean()[0], temperature**2 * expected.mean(), rtol=1e-5)
    assert totals.weight == 7


def test_what_does_not_fit_is_refused(rollout):
    logits, targets = rollout
    two, three = jnp.zeros((1, 2)), jnp.zeros((1, 3))
    for call, message in (
        (lambda: policy.gkd(logits, logits, beta=1.5), "beta"),
        (lambda: policy.mix_log_probs(two, two, teacher_share=1.0), "teacher_share"),
        (lambda: policy.mix_log_probs(two, three), r"student \(1, 2\), teacher \(1, 3\)"),
        (lambda: policy.importance_weights(two, two, three), r"where \(1, 3\)"),
        (lambda: policy.returns_to_go(two, three), r"where \(1, 3\)"),
        (lambda: policy.whiten(two, three), "shape"),
        (lambda: policy.minillm_advantages(two, three, three), r"student \(1, 2\)"),
        (lambda: policy.minillm_advantages(two, two, two, reward_clip=0.0), "reward_clip"),
        (lambda: policy.clipped_surrogate(two, two, three), r"advantages \(1, 3\)"),
        (lambda: policy.clipped_surrogate(two, two, two, clip=0.0), "clip"),
        (lambda: policy.minillm("70b")(logits, targets), "'70b'"),
        (lambda: policy.minillm("8b")(logits, targets | {"weights": two}), "weights"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
