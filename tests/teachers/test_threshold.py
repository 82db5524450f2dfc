"""Threshold sampling against float64, by drawing again and again."""

import jax
import numpy as np
import pytest
import scipy.optimize
import scipy.special

from distill_jax import losses, teachers
from distill_jax.teachers import sampling

from .test_schemes import encode, keys

TAU, IDS, REDRAWS = 0.05, 9, 1500


def teacher(kind):
    """Logits [V] of a teacher that is difficult in some way."""
    rng = np.random.default_rng(7)
    logits = 3 * rng.standard_normal(397)
    if kind == "ties":
        logits = np.round(logits)
    elif kind == "impossible ids":
        logits[rng.random(397) < 0.6] = -np.inf
    elif kind == "three possible ids":
        logits[3:] = -np.inf
    elif kind == "uniform":
        logits[:] = 0.25
    elif kind == "one-hot":
        logits = np.where(np.arange(397) == 396, 0.0, -np.inf)
    elif kind == "long tail":
        logits = np.concatenate([[9.0, 8.0, 7.5], np.full(30_000, -4.0), [8.5]])
    return logits.astype(np.float32)


KINDS = ["plain", "ties", "impossible ids", "three possible ids", "uniform", "one-hot", "long tail"]
SCHEMES = [teachers.Threshold(tau=TAU), teachers.Threshold(ids=IDS)]


def exact_threshold(probs, ids):
    """Oracle: the root of sum min(1, p / tau) = K."""
    excess = lambda log_tau: np.minimum(probs / np.exp(log_tau), 1).sum() - ids  # noqa: E731
    return np.exp(scipy.optimize.brentq(excess, -60, 0.1, xtol=1e-13))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_mean_over_redraws_is_the_distribution(kind, scheme):
    logits = teacher(kind)
    redraws = 150 if kind == "long tail" else REDRAWS
    encoded = encode(scheme, np.tile(logits, (redraws, 1)), keys(redraws), 1.25)
    probs = scipy.special.softmax(logits.astype(np.float64) / 1.25)
    tau = TAU if scheme.tau else float(np.exp(encoded["log_tau"][0]))
    assert (encoded["length"] <= scheme.width).all()
    assert encoded["ids"].shape[1] == scheme.width

    weights = scheme.unpack(encoded)["weights"].astype(np.float64)
    assert ((weights > 0).sum(axis=-1) == encoded["length"]).all()
    mean = np.bincount(encoded["ids"].ravel(), weights.ravel(), minlength=len(probs)) / redraws
    exact = probs >= tau * (1 + 1e-6)
    np.testing.assert_allclose(mean[exact], probs[exact], rtol=1e-5)
    assert not mean[probs == 0].any()
    # One by one where an id is expected ten times, the others together by place and by size.
    deviation = np.sqrt(np.maximum(probs * (tau - probs), 1e-12) / redraws)
    often = ~exact & (redraws * probs / tau > 10)
    rare = np.flatnonzero(~exact & ~often & (probs > 0))
    error, variance = (mean - probs)[~exact], (deviation**2)[~exact]
    z = [*((mean - probs)[often] / deviation[often])]
    if rare.size:
        groups = [rare, *np.array_split(rare, 5), rare[::2], rare[probs[rare].argsort()[::2]]]
        z += [(mean - probs)[g].sum() / np.sqrt((deviation[g] ** 2).sum()) for g in groups]
        assert abs(error.sum()) < 4 * np.sqrt(variance.sum())
    assert np.abs(z).max(initial=0) < 4.2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_likely_ids_come_first_and_are_exact(kind, scheme):
    logits = teacher(kind)
    encoded = encode(scheme, np.tile(logits, (50, 1)), keys(50, seed=4))
    log_probs = scipy.special.log_softmax(logits.astype(np.float64))
    tau = TAU if scheme.tau else float(np.exp(encoded["log_tau"][0]))
    likely = np.flatnonzero(log_probs >= np.log(tau) + 1e-6)
    # A systematic sample has one size or the next: the sum of the chances, rounded either way.
    expected = np.minimum(np.exp(log_probs) / tau, 1).sum()
    assert np.abs(encoded["length"] - expected).max() < 1 + 1e-3
    for ids, length, exact, values in zip(
        encoded["ids"], encoded["length"], encoded["exact"], encoded["log_probs"]
    ):
        assert exact in (len(likely), (log_probs >= np.log(tau) - 1e-6).sum())
        assert set(ids[:exact]) >= set(likely)
        np.testing.assert_allclose(values[:exact], log_probs[ids[:exact]], rtol=1e-5, atol=1e-6)
        assert (np.diff(ids[:exact]) > 0).all()
        assert (np.diff(ids[exact:length]) > 0).all()
        assert len(set(ids[:length])) == length
        assert (log_probs[ids[exact:length]] < np.log(tau) + 1e-6).all()
        assert not ids[length:].any()


@pytest.mark.parametrize("kind", ["plain", "ties", "impossible ids", "uniform", "long tail"])
def test_a_number_of_ids_is_met(kind):
    logits = teacher(kind)
    encoded = encode(SCHEMES[1], np.tile(logits, (200, 1)), keys(200))
    tau = exact_threshold(scipy.special.softmax(logits.astype(np.float64)), IDS)
    log_tau = encoded["log_tau"][0].astype(np.float64)
    assert log_tau * 1024 == round(log_tau * 1024)
    assert -1e-6 < log_tau - np.log(tau) < 1 / 1024 + 1e-6
    assert set(encoded["length"].tolist()) <= {IDS - 1, IDS}
    assert encoded["length"].mean() > IDS - 0.1


@pytest.mark.slow
def test_a_peaked_teacher_has_one_id_or_all_it_can():
    one_hot = encode(SCHEMES[0], teacher("one-hot")[None], keys(1))
    assert (one_hot["length"], one_hot["exact"], one_hot["ids"][0, 0]) == (1, 1, 396)
    few = encode(SCHEMES[1], teacher("three possible ids")[None], keys(1))
    assert few["length"][0] <= 3
    peaked = np.full(500, -30.0, np.float32)
    peaked[7] = 0
    encoded = encode(SCHEMES[1], peaked[None], keys(1))
    assert encoded["exact"][0] == 1
    # Seven eighths of the ids are for a tail of 5e-11.
    expected = np.log(499 * np.exp(-30.0) / (IDS - 1))
    assert encoded["log_tau"][0] == pytest.approx(expected, rel=1e-3)
    assert encoded["length"][0] in (IDS - 1, IDS)


def test_a_teacher_that_is_not_finite_shows():
    logits = np.array([[0.0, np.nan, 1.0]] * 2, np.float32)
    logits[1] = 0, 1, 2
    for scheme in (SCHEMES[0], teachers.Threshold(ids=2)):
        encoded = encode(scheme, logits, keys(2))
        assert np.isnan(encoded["entropy"]).tolist() == [True, False]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_squared_error_is_that_of_poisson_sampling(scheme):
    """E |w - p|^2 = sum of p (tau - p) over the tail, whatever the ids' joint chances."""
    logits, redraws = teacher("plain"), 3000
    encoded = encode(scheme, np.tile(logits, (redraws, 1)), keys(redraws))
    probs = scipy.special.softmax(logits.astype(np.float64))
    tau = TAU if scheme.tau else float(np.exp(encoded["log_tau"][0]))
    weights = scheme.unpack(encoded)["weights"].astype(np.float64)
    kept = np.where(weights > 0, probs[encoded["ids"]], 0)
    errors = (np.square(weights - kept) - np.square(kept)).sum(axis=-1) + np.square(probs).sum()
    expected = (probs * (tau - probs))[probs < tau].sum()
    assert errors.mean() == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
def test_the_mean_gradient_is_that_of_the_whole_distribution():
    scheme, logits, redraws = SCHEMES[0], teacher("plain"), 2000
    encoded = encode(scheme, np.tile(logits, (redraws, 1)), keys(redraws))
    arrays = scheme.unpack(encoded)
    student = np.random.default_rng(1).standard_normal(397).astype(np.float32)

    def mean_loss(student_V):
        logits_NV = jax.numpy.tile(student_V, (redraws, 1))
        return losses.forward_kl(logits_NV, scheme.targets(arrays, 1.0)).mean()

    probs = scipy.special.softmax(logits.astype(np.float64))
    expected = scipy.special.softmax(student.astype(np.float64)) - probs
    error = np.asarray(jax.grad(mean_loss)(student)) - expected
    # The weights' sum varies by less than tau, which moves every entry by its share q.
    deviation = np.sqrt(np.maximum(probs * (TAU - probs), 0) + TAU**2 * expected.clip(0) ** 2)
    # An id that is expected less than once may come four times.
    assert (np.abs(error) < 4.5 * deviation / np.sqrt(redraws) + 4 * TAU / redraws).all()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [*SCHEMES, teachers.RandomSampling(draws=20)])
def test_the_mean_value_is_the_divergence(scheme):
    """The entropy is known, so that not only the gradient is unbiased."""
    redraws, temperature = 2000, 2.0
    logits = teacher("plain")
    student = (logits + np.random.default_rng(1).standard_normal(397)).astype(np.float32)
    encoded = encode(scheme, np.tile(logits, (redraws, 1)), keys(redraws), temperature)
    targets = scheme.targets(scheme.unpack(encoded), temperature)
    found = losses.forward_kl(np.tile(student, (redraws, 1)), targets, temperature=temperature)
    p, q = (scipy.special.softmax(x.astype(np.float64) / temperature) for x in (logits, student))
    expected = temperature**2 * scipy.special.rel_entr(p, q).sum()
    assert abs(found.mean() - expected) < 4 * found.std() / np.sqrt(redraws)
    # Without it the value is off by more than that.
    alone = losses.SampledTargets(targets.ids, targets.weights, temperature)
    off = losses.forward_kl(np.tile(student, (redraws, 1)), alone, temperature=temperature)
    assert off.mean() - expected > 8 * found.std() / np.sqrt(redraws)


@pytest.mark.slow
def test_a_token_alone_and_its_key_decide():
    logits = np.random.default_rng(3).standard_normal((4, 397)).astype(np.float32) * 3
    other = sampling.token_keys(jax.numpy.array([9, 9], jax.numpy.uint32), jax.numpy.arange(4))
    one, two = encode(SCHEMES[0], logits, keys(4)), encode(SCHEMES[0], logits, other)
    assert (one["ids"] != two["ids"]).any(axis=-1).all()
