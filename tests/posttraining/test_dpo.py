import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import data, models, parallel
from distill_jax.artifacts import InputError
from distill_jax.posttraining import (
    DpoConfig,
    Pair,
    dpo_loss,
    encode_pair,
    encode_prompt,
    label_log_probs,
    pair_rows,
    sampled_pairs,
    with_reference,
)

PAIRS = [
    Pair([1, 2, 3], [4, 5], [6, 7, 8, 9]),
    Pair([1, 2], [10, 11, 12], [13]),
    Pair([3], [14], [15, 16]),
]
DPO = DpoConfig(sequence_length=8, beta=0.3, chunk=7)


def batch_of(rows) -> dict:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.fixture(scope="module")
def reference(random_model) -> models.Model:
    return random_model(24, seed=0)


@pytest.fixture(scope="module")
def rows(reference):
    return with_reference(reference, pair_rows(PAIRS, DPO), DPO, pairs_per_batch=2)


def plain_log_probs(config, params) -> jax.Array:
    """[pairs, 2] from whole logits, one sequence a row, picked token by token."""
    sequences = [(pair.prompt, half) for pair in PAIRS for half in (pair.chosen, pair.rejected)]
    tokens = np.zeros((len(sequences), 8), np.int32)
    for row, (prompt, completion) in enumerate(sequences):
        tokens[row, : len(prompt) + len(completion)] = prompt + completion
    table = jax.nn.log_softmax(models.logits(config, params, jnp.asarray(tokens)))
    sums = [
        sum(table[row, len(prompt) + i - 1, token] for i, token in enumerate(completion))
        for row, (prompt, completion) in enumerate(sequences)
    ]
    return jnp.stack(sums).reshape(-1, 2)


def plain(model: models.Model) -> np.ndarray:
    return np.asarray(jax.jit(plain_log_probs, static_argnums=0)(model.config, model.params))


def test_reference_log_probs_are_those_of_each_sequence_alone(reference, rows):
    got = [row["reference_log_probs"] for row in rows]
    np.testing.assert_allclose(got, plain(reference), rtol=1e-5)


def test_on_a_mesh_every_device_reads_pairs_of_its_own(reference, split):
    rows, mesh = pair_rows(PAIRS, DPO), parallel.make_mesh()
    got = with_reference(split(reference, mesh), rows, DPO, pairs_per_batch=2, mesh=mesh)
    np.testing.assert_allclose(
        [row["reference_log_probs"] for row in got], plain(reference), rtol=1e-5
    )
    low = with_reference(split(reference, mesh), rows, DPO, compute_dtype="bfloat16", mesh=mesh)
    rounded = np.array([row["reference_log_probs"] for row in low])
    assert 1e-4 < np.abs(rounded / plain(reference) - 1).max() < 0.05


VARIANTS = {
    "DPO": DPO,
    "conservative DPO": dataclasses.replace(DPO, label_smoothing=0.1),
    "robust DPO": dataclasses.replace(DPO, loss="robust_dpo", label_smoothing=0.2, nll_weight=0.0),
    "IPO": dataclasses.replace(DPO, loss="ipo"),
    "IPO as TRL has it": dataclasses.replace(DPO, loss="ipo", length_normalised=True),
    "length-normalised DPO": dataclasses.replace(DPO, length_normalised=True, beta=2.0),
}


def in_numpy(config: DpoConfig, policy: np.ndarray, reference: np.ndarray):
    """TRL's formulas in float64: (loss, its terms, gradient of the log-probabilities), summed."""
    lengths = np.array([[len(pair.chosen), len(pair.rejected)] for pair in PAIRS])
    scale = 1 / lengths if config.length_normalised else np.ones_like(lengths, np.float64)
    ratio = scale * (policy.astype(np.float64) - reference)
    delta, beta, e = ratio[:, 0] - ratio[:, 1], config.beta, config.label_smoothing
    right, flipped = (np.log1p(np.exp(-sign * beta * delta)) for sign in (1, -1))
    drop = 1 / (1 + np.exp(beta * delta))  # sigmoid(-beta delta)
    match config.loss:
        case "dpo":
            loss = (1 - e) * right + e * flipped
            slope = -beta * ((1 - e) * drop - e * (1 - drop))
        case "robust_dpo":
            loss = ((1 - e) * right - e * flipped) / (1 - 2 * e)
            slope = -beta * ((1 - e) * drop + e * (1 - drop)) / (1 - 2 * e)
        case "ipo":
            loss = (delta - 1 / (2 * beta)) ** 2
            slope = 2 * (delta - 1 / (2 * beta))
    nll = -policy[:, 0] / lengths[:, 0]
    gradient = slope[:, None] * scale * [1, -1]
    gradient[:, 0] -= config.nll_weight / lengths[:, 0]
    terms = {
        "chosen_reward": beta * ratio[:, 0],
        "rejected_reward": beta * ratio[:, 1],
        "reward_margin": beta * delta,
        "reward_accuracy": delta > 0,
        "nll": nll,
        config.loss: loss,
        "chosen_log_prob": policy[:, 0],
        "rejected_log_prob": policy[:, 1],
    }
    total = (loss + config.nll_weight * nll).sum()
    return total, {name: term.sum() for name, term in terms.items()}, gradient


@pytest.fixture(scope="module")
def policy(random_model):
    """A model, the log-probabilities it gives, [pairs, 2], and their gradient along a direction."""
    model = random_model(24, seed=1)
    log_probs, along = jax.vjp(
        jax.jit(functools.partial(plain_log_probs, model.config)), model.params
    )
    return model, np.asarray(log_probs), along


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, id=name, marks=() if name in ("DPO", "IPO") else pytest.mark.slow)
        for name, config in VARIANTS.items()
    ],
)
def test_loss_terms_and_gradient_are_trls_formulas(policy, reference, rows, config):
    model, log_probs, along = policy

    @functools.partial(jax.grad, has_aux=True)
    def ours(params):
        totals = dpo_loss(model.config, config)(params, batch_of(rows), jnp.int32(0))
        return totals.loss, totals

    gradient, totals = jax.jit(ours)(model.params)
    loss, terms, outer = in_numpy(config, log_probs, plain(reference))
    np.testing.assert_allclose(totals.loss, loss, rtol=1e-5)
    assert totals.weight == len(PAIRS)
    assert totals.terms.keys() == terms.keys()
    for name, term in terms.items():
        np.testing.assert_allclose(totals.terms[name], term, rtol=1e-4, err_msg=name)
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5),
        gradient,
        along(jnp.asarray(outer, jnp.float32))[0],
    )


def test_at_the_reference_the_margin_is_zero(reference, rows):
    totals = jax.jit(dpo_loss(reference.config, DPO))(
        reference.params, batch_of(rows), jnp.int32(0)
    )
    _, terms = totals.mean()
    np.testing.assert_allclose(terms["reward_margin"], 0, atol=1e-5)
    np.testing.assert_allclose(terms["dpo"], np.log(2), rtol=1e-5)


def test_rows_survive_the_input_pipeline(rows):
    batch = next(data.batches(rows, batch_rows=3, seed=0, shuffle=False))
    assert batch["tokens"].shape == (3, 2, 8)
    for name, values in batch_of(rows).items():
        np.testing.assert_array_equal(batch[name], values)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [4, 64])
def test_chunks_change_neither_values_nor_gradients(chunk):
    hidden = jax.random.normal(jax.random.key(0), (10, 6))
    matrix = jax.random.normal(jax.random.key(1), (6, 20))
    labels = jnp.arange(10)

    def whole(hidden, matrix):
        return jax.nn.log_softmax(hidden @ matrix)[jnp.arange(10), labels]

    def chunked(hidden, matrix):
        return label_log_probs(hidden, matrix, labels, chunk=chunk)

    np.testing.assert_allclose(chunked(hidden, matrix), whole(hidden, matrix), rtol=1e-5)
    weights = jnp.linspace(-1, 1, 10)
    got, want = (
        jax.grad(lambda h, m, f=f: weights @ f(h, m), argnums=(0, 1))(hidden, matrix)
        for f in (chunked, whole)
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_pairs_come_from_samples_and_from_text(tokenizer):
    samples = [{"tokens": [301]}, {"tokens": [302]}, {"tokens": [303]}]
    record = {"before": [], "prompt": "Say a", "answer": "a", "samples": samples}
    record |= {"chosen": 2, "rejected": 0}
    messages = [{"role": "user", "content": "Say a"}]
    prompt = encode_prompt(tokenizer, messages)
    (pair,) = sampled_pairs(tokenizer, [record, {**record, "rejected": None}])
    assert pair == Pair(prompt, [303], [301])
    assert encode_pair(tokenizer, messages, "a", "b") == Pair(
        prompt, tokenizer.encode("a"), tokenizer.encode("b")
    )


@pytest.mark.parametrize(
    ("pair", "complaint"),
    [
        (Pair([1], [2], [2]), "pair 1: chosen and rejected are the same"),
        (Pair([1], [], [2]), "pair 1: the chosen answer is empty"),
        (Pair([1], [2], []), "pair 1: the rejected answer is empty"),
        (Pair([], [2], [3]), "pair 1: the prompt is empty"),
        (Pair([1] * 8, [2], [3]), "pair 1: prompt and chosen answer are 9 tokens, a row holds 8"),
    ],
)
def test_a_bad_pair_is_named(pair, complaint):
    with pytest.raises(InputError, match=complaint):
        pair_rows([PAIRS[0], pair], DPO)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beta", 0.0),
        ("nll_weight", -1.0),
        ("chunk", 0),
        ("sequence_length", 1),
        ("label_smoothing", 0.5),
    ],
)
def test_a_config_that_cannot_train_is_refused(field, value):
    with pytest.raises(InputError, match=f"DpoConfig.{field} is {value}"):
        DpoConfig(**{field: value})


def test_a_variant_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match="loss is 'kto'; choose one of dpo, robust_dpo, ipo"):
        DpoConfig(loss="kto")
    with pytest.raises(InputError, match=r"DpoConfig\.label_smoothing: ipo has none"):
        DpoConfig(loss="ipo", label_smoothing=0.1)
