import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from distill_jax import losses
from distill_jax.losses import preference, reduction


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


LENGTHS = {"chosen_length_B": np.arange(1, 7), "rejected_length_B": np.arange(12, 6, -1)}


def trl_loss(kind, chosen, rejected, beta, label_smoothing):
    """TRL's loss types on log-ratios of the two answers: means over tokens for ipo, else sums."""
    delta = chosen - rejected
    right = -scipy.special.log_expit(beta * delta)
    flipped = -scipy.special.log_expit(-beta * delta)
    match kind:
        case "dpo":
            return (1 - label_smoothing) * right + label_smoothing * flipped
        case "robust_dpo":
            return ((1 - label_smoothing) * right - label_smoothing * flipped) / (
                1 - 2 * label_smoothing
            )
        case "ipo":
            return (delta - 1 / (2 * beta)) ** 2


def variant(kind, label_smoothing, **kwargs):
    """Our function; only some take a label smoothing."""
    smoothing = {} if kind == "ipo" else {"label_smoothing": label_smoothing}
    return lambda *log_probs: getattr(preference, kind)(*log_probs, **smoothing, **kwargs)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.45])
@pytest.mark.parametrize("lengths", [{}, LENGTHS])
@pytest.mark.parametrize("kind", ["dpo", "robust_dpo", "ipo"])
def test_variants_equal_trls_formulas(kind, lengths, label_smoothing, log_probs):
    exact = np.asarray(log_probs, np.float64)
    chosen, rejected = exact[0] - exact[2], exact[1] - exact[3]
    if lengths:
        chosen, rejected = chosen / LENGTHS["chosen_length_B"], rejected / np.arange(12, 6, -1)
    expected = trl_loss(kind, chosen, rejected, 0.3, label_smoothing)
    lengths = {name: jnp.asarray(length) for name, length in lengths.items()}
    loss, terms = variant(kind, label_smoothing, beta=0.3, **lengths)(*log_probs)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(terms["chosen_reward"], 0.3 * chosen, rtol=1e-5)
    np.testing.assert_allclose(terms["rejected_reward"], 0.3 * rejected, rtol=1e-5)
    np.testing.assert_allclose(terms["reward_margin"], 0.3 * (chosen - rejected), rtol=1e-4)
    np.testing.assert_array_equal(terms["reward_accuracy"], chosen > rejected)


@pytest.mark.parametrize("kind", ["dpo", "robust_dpo", "ipo"])
def test_terms_and_reference_carry_no_gradient(kind, log_probs):
    terms = jax.jacrev(lambda *log_probs: variant(kind, 0.1)(*log_probs)[1], argnums=(0, 1))
    reference = jax.jacrev(lambda *log_probs: variant(kind, 0.1)(*log_probs)[0], argnums=(2, 3))
    slopes = terms(*log_probs), reference(*log_probs)
    jax.tree.map(lambda slope: np.testing.assert_array_equal(slope, 0), slopes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "robust_dpo", "ipo"])
def test_gradients_equal_autograd(kind, log_probs):
    """With the NLL term, through the sum over an answer's tokens."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    tokens = -rng.uniform(0, 3, size=(2, 6, 5))
    where = rng.uniform(size=(2, 6, 5)) < 0.6
    where[..., 0] = True
    reference = -rng.uniform(0, 8, size=(2, 6))

    policy = torch.tensor(tokens, requires_grad=True)
    length = torch.tensor(where.sum(-1))
    summed = (policy * torch.tensor(where)).sum(-1)
    delta = ((summed - torch.tensor(reference)) / length)[0]
    delta = delta - ((summed - torch.tensor(reference)) / length)[1]
    right, flipped = (-torch.nn.functional.logsigmoid(sign * 0.7 * delta) for sign in (1, -1))
    loss = {
        "dpo": 0.8 * right + 0.2 * flipped,
        "robust_dpo": (0.8 * right - 0.2 * flipped) / 0.6,
        "ipo": (delta - 1 / 1.4) ** 2,
    }[kind] - 0.2 * summed[0] / length[0]
    loss.sum().backward()

    def ours(tokens):
        (chosen, rejected), (chosen_length, rejected_length) = zip(
            *(preference.sum_log_probs(tokens[i], jnp.asarray(where[i])) for i in (0, 1))
        )
        lengths = {"chosen_length_B": chosen_length, "rejected_length_B": rejected_length}
        pair, _ = variant(kind, 0.2, beta=0.7, **lengths)(
            chosen, rejected, *jnp.asarray(reference, jnp.float32)
        )
        return jnp.sum(pair + 0.2 * preference.sequence_nll(chosen, chosen_length))

    value, slope = jax.value_and_grad(ours)(jnp.asarray(tokens, jnp.float32))
    np.testing.assert_allclose(value, loss.sum().item(), rtol=1e-5)
    np.testing.assert_allclose(slope, policy.grad.numpy(), rtol=1e-4, atol=1e-6)


def test_robust_loss_undoes_flipped_labels(log_probs):
    chosen, rejected, reference_chosen, reference_rejected = log_probs
    right, flipped = (
        preference.robust_dpo(*pair, label_smoothing=0.2)[0]
        for pair in (
            (chosen, rejected, reference_chosen, reference_rejected),
            (rejected, chosen, reference_rejected, reference_chosen),
        )
    )
    np.testing.assert_allclose(
        0.8 * right + 0.2 * flipped, preference.dpo(*log_probs)[0], rtol=1e-5, atol=1e-6
    )


def test_conservative_and_identity_losses_stop_at_their_margins():
    """Where sigmoid(margin) is 1 - smoothing, and where the margin is 1 / 2."""
    zero = jnp.zeros(1)
    for kind, log_ratio in (("dpo", np.log(0.9 / 0.1) / 2.0), ("ipo", 0.5 / 2.0)):
        slope = jax.grad(
            lambda chosen, kind=kind: variant(kind, 0.1, beta=2.0)(chosen, zero, zero, zero)[
                0
            ].sum()
        )
        best = jnp.asarray([log_ratio], jnp.float32)
        np.testing.assert_allclose(slope(best), 0.0, atol=1e-6)
        assert slope(best - 0.1) < -1e-2
        assert slope(best + 0.1) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [bool, np.float32, np.int32])
def test_masked_tokens_change_nothing(dtype):
    nan = float("nan")
    tokens = jnp.asarray([[-1.0, nan, -3.0, nan], [nan, nan, nan, -0.5], [nan] * 4])
    where = jnp.asarray([[1, 0, 1, 0], [0, 0, 0, 1], [0] * 4], dtype)
    log_probs, lengths = preference.sum_log_probs(tokens, where)
    np.testing.assert_array_equal(log_probs, [-4.0, -0.5, 0.0])
    np.testing.assert_array_equal(lengths, [2, 1, 0])
    np.testing.assert_array_equal(preference.sequence_nll(log_probs, lengths), [2.0, 0.5, 0.0])

    def loss(tokens, where):
        log_probs, lengths = preference.sum_log_probs(tokens, where)
        zero = jnp.zeros(len(tokens))
        pair_B, terms = preference.dpo(
            log_probs, zero, zero, zero, chosen_length_B=lengths, rejected_length_B=lengths
        )
        pair_B = pair_B + 0.2 * preference.sequence_nll(log_probs, lengths)
        return reduction.reduce(pair_B, terms, lengths > 0).loss

    value, slope = jax.value_and_grad(loss)(tokens, where)
    alone = [jnp.asarray([[-1.0, -3.0]]), jnp.asarray([[-0.5]])]
    values, slopes = zip(*(jax.value_and_grad(loss)(row, jnp.ones(row.shape)) for row in alone))
    np.testing.assert_allclose(value, sum(values), rtol=1e-6)
    np.testing.assert_allclose(slope[where != 0], np.concatenate(slopes, axis=1)[0], rtol=1e-6)
    np.testing.assert_array_equal(slope[where == 0], 0.0)


def test_bradley_terry_is_the_log_likelihood_of_the_preference():
    chosen, rejected = np.random.default_rng(3).normal(scale=3, size=(2, 7))
    margin = chosen - rejected
    loss, terms = losses.bradley_terry(jnp.asarray(chosen), jnp.asarray(rejected))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, -scipy.special.log_expit(margin), rtol=1e-5)
    expected = {
        "chosen_score": chosen,
        "rejected_score": rejected,
        "score_margin": margin,
        "score_accuracy": margin > 0,
    }
    assert terms.keys() == expected.keys()
    for name, term in expected.items():
        np.testing.assert_allclose(terms[name], term, rtol=1e-5, err_msg=name)
    slopes = jax.grad(lambda *scores: losses.bradley_terry(*scores)[0].sum(), argnums=(0, 1))(
        *jnp.asarray([chosen, rejected], jnp.float32)
    )
    np.testing.assert_allclose(slopes[0], -scipy.special.expit(-margin), rtol=1e-5)
    np.testing.assert_allclose(slopes[1], scipy.special.expit(-margin), rtol=1e-5)
    far = jnp.asarray([1e4, -1e4])
    np.testing.assert_allclose(losses.bradley_terry(far, jnp.zeros(2))[0], [0.0, 1e4], atol=1e-6)
    terms = jax.jacrev(lambda scores: losses.bradley_terry(scores, jnp.zeros(2))[1])(far)
    jax.tree.map(lambda slope: np.testing.assert_array_equal(slope, 0), terms)
    with pytest.raises(ValueError, match="differ in shape"):
        losses.bradley_terry(far, far[:1])


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
    with pytest.raises(ValueError, match="differ in shape"):
        preference.ipo(chosen, rejected, reference[0][1:], reference[1])
    with pytest.raises(ValueError, match="beta"):
        preference.ipo(*log_probs, beta=0.0)
    with pytest.raises(ValueError, match="label_smoothing"):
        preference.robust_dpo(*log_probs, label_smoothing=0.5)
    with pytest.raises(ValueError, match="label_smoothing"):
        preference.dpo(*log_probs, label_smoothing=-0.1)
    with pytest.raises(ValueError, match="where"):
        preference.sum_log_probs(log_probs, log_probs[:2])
    with pytest.raises(ValueError, match="differ in shape"):
        preference.sequence_nll(chosen, chosen[1:])
