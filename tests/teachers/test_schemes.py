import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import losses, teachers
from distill_jax.artifacts import InputError
from distill_jax.teachers import sampling

TOKENS, VOCAB = 5, 400
SCHEMES = [
    teachers.TopK(k=6),
    teachers.RandomSampling(draws=12),
    teachers.Threshold(tau=0.05),
    teachers.Threshold(ids=8),
]


@pytest.fixture(scope="module")
def logits():
    return (4 * np.random.default_rng(0).standard_normal((TOKENS, VOCAB))).astype(np.float32)


def exact_log_probs(logits, temperature=1.0):
    """Oracle: log-softmax in float64 NumPy."""
    scaled = logits.astype(np.float64) / temperature
    scaled -= scaled.max(axis=-1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(axis=-1, keepdims=True))


def keys(count, seed=0):
    return sampling.token_keys(jnp.array([seed, 1], jnp.uint32), jnp.arange(count))


def encode(scheme, logits, token_keys, temperature=1.0, labels=None):
    labels = np.zeros(len(logits), np.int32) if labels is None else labels
    encode_jit = jax.jit(lambda *arrays: scheme.encode(*arrays, temperature))
    return jax.tree.map(np.asarray, encode_jit(logits, labels, token_keys))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_top_k_against_float64(logits, temperature):
    encoded = encode(teachers.TopK(k=9), logits, keys(TOKENS), temperature)
    exact = exact_log_probs(logits, temperature)
    order = np.argsort(-logits, axis=-1, kind="stable")
    np.testing.assert_array_equal(encoded["ids"], order[:, :9])
    expected = np.take_along_axis(exact, order, axis=-1)
    np.testing.assert_allclose(encoded["log_probs"], expected[:, :9], rtol=1e-5, atol=1e-6)
    tail = np.log(np.exp(expected[:, 9:]).sum(axis=-1))
    np.testing.assert_allclose(encoded["log_tail"], tail, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(encoded["entropy"], -(np.exp(exact) * exact).sum(-1), rtol=1e-4)
    np.testing.assert_array_equal(encoded["length"], 9)


def test_a_tail_far_below_float32_resolution_is_exact():
    logits = np.full((1, 1000), -40.0, np.float32)
    logits[0, [5, 6]] = 0.0, -0.5
    encoded = encode(teachers.TopK(k=2), logits, keys(1))
    expected = np.log(998 * np.exp(-40.0) / (1 + np.exp(-0.5) + 998 * np.exp(-40.0)))
    assert expected < -33
    np.testing.assert_allclose(encoded["log_tail"], expected, rtol=1e-6)


def test_the_whole_vocabulary_leaves_no_tail(logits):
    encoded = encode(teachers.TopK(k=VOCAB), logits, keys(TOKENS))
    assert (encoded["log_tail"] == -np.inf).all()


def test_equal_logits_share_mass_between_inside_and_outside():
    encoded = encode(teachers.TopK(k=3), np.zeros((1, 10), np.float32), keys(1))
    np.testing.assert_array_equal(encoded["ids"], [[0, 1, 2]])
    np.testing.assert_allclose(encoded["log_tail"], np.log(0.7), rtol=1e-6)


def test_random_sampling_is_unbiased(logits):
    """The mean weight of an id over many rows is its probability, within binomial error."""
    rows, draws = 400, 20
    scheme = teachers.RandomSampling(draws=draws)
    many = np.repeat(logits[:1], rows, axis=0)
    encoded = encode(scheme, many, keys(rows), temperature=1.5)
    total = np.bincount(encoded["ids"].ravel(), encoded["counts"].ravel(), minlength=VOCAB)
    assert total.sum() == rows * draws
    probs = np.exp(exact_log_probs(logits[:1], 1.5))[0]
    deviation = np.sqrt(rows * draws * probs * (1 - probs))
    z = (total - rows * draws * probs)[deviation > 1] / deviation[deviation > 1]
    assert np.abs(z).max() < 4.5
    # The variance too is that of independent draws, not of correlated tokens.
    assert 0.6 < np.mean(z**2) < 1.4


@pytest.mark.slow
def test_weights_estimate_the_gradient_of_the_whole_distribution(logits):
    """Through the loss itself: the mean gradient over many samples is softmax(student) - p."""
    rows, scheme = 600, teachers.RandomSampling(draws=50)
    many = np.repeat(logits[:1], rows, axis=0)
    encoded = encode(scheme, many, keys(rows))
    arrays = scheme.unpack(encoded)
    student = np.zeros(VOCAB, np.float32)

    def mean_loss(student_V):
        return losses.forward_kl(jnp.tile(student_V, (rows, 1)), scheme.targets(arrays, 1.0)).mean()

    gradient = jax.grad(mean_loss)(student)
    probs = np.exp(exact_log_probs(logits[:1]))[0]
    error = np.sqrt(probs * (1 - probs) / (rows * 50))
    assert (np.abs(gradient - (1 / VOCAB - probs)) < 5 * error + 1e-4).all()


@pytest.mark.slow
def test_all_ids_as_top_k_give_the_whole_divergence(logits):
    scheme = teachers.TopK(k=VOCAB)
    arrays = scheme.unpack(encode(scheme, logits, keys(TOKENS)))
    student = np.random.default_rng(1).standard_normal((TOKENS, VOCAB)).astype(np.float32)
    teacher_log_probs, student_log_probs = exact_log_probs(logits), exact_log_probs(student)
    expected = (np.exp(teacher_log_probs) * (teacher_log_probs - student_log_probs)).sum(axis=-1)
    targets = teachers.to_targets(scheme, arrays)
    np.testing.assert_allclose(losses.forward_kl(student, targets), expected, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_token_is_sampled_alike_in_any_batch(logits, scheme):
    token_keys = keys(TOKENS)
    together = encode(scheme, logits, token_keys)
    order = np.array([3, 0])
    apart = encode(scheme, logits[order], token_keys[order])
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[order], y), together, apart)


def test_bfloat16_logits(logits):
    rounded = jnp.asarray(logits, jnp.bfloat16)
    encoded = encode(teachers.TopK(k=4), rounded, keys(TOKENS))
    exact = exact_log_probs(np.asarray(rounded.astype(jnp.float32)))
    expected = np.take_along_axis(exact, encoded["ids"], axis=-1)
    np.testing.assert_allclose(encoded["log_probs"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_json_round_trip(scheme):
    assert teachers.scheme_from_json(teachers.scheme_to_json(scheme)) == scheme


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"name": "top_p"}, "'top_p' is none of top_k"),
        ({"k": 3}, "None is none of"),
        ({"name": "top_k"}, "fields"),
        ({"name": "top_k", "k": 3, "p": 1}, "fields"),
        ({"name": "top_k", "k": 0}, "TopK.k: 0"),
        ({"name": "random_sampling", "draws": -1}, "RandomSampling.draws: -1"),
        ({"name": "threshold", "tau": 0.0, "ids": None}, "Threshold.tau: 0.0"),
        ({"name": "threshold", "tau": 1.5, "ids": None}, "Threshold.tau: 1.5"),
        ({"name": "threshold", "tau": None, "ids": 0}, "Threshold.ids: 0"),
        ({"name": "threshold", "tau": None, "ids": None}, "give tau .* or ids"),
        ({"name": "threshold", "tau": 0.1, "ids": 10}, "give tau .* or ids"),
    ],
)
def test_wrong_schemes_are_refused(value, message):
    with pytest.raises(InputError, match=message):
        teachers.scheme_from_json(value)


def test_more_ids_than_the_vocabulary_are_refused():
    for scheme in (teachers.TopK(k=11), teachers.Threshold(ids=11)):
        with pytest.raises(InputError, match="11 ids of a vocabulary of 10"):
            scheme.columns(10)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_stored_of_every_token(logits, scheme):
    labels = np.array([3, 399, 0, -1, 17])
    encoded = encode(scheme, logits, keys(TOKENS), 1.5, labels)
    exact = exact_log_probs(logits, 1.5)
    np.testing.assert_allclose(encoded["entropy"], -(np.exp(exact) * exact).sum(-1), rtol=1e-4)
    expected = np.where(labels < 0, 0, exact[np.arange(TOKENS), labels])
    np.testing.assert_allclose(encoded["label_log_prob"], expected, rtol=1e-5)
    arrays = scheme.unpack(encoded)
    for name in ("entropy", "label_log_prob"):
        np.testing.assert_array_equal(arrays[name], encoded[name])
