import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, log_expit

from distill_jax import models, parallel
from distill_jax.artifacts import InputError
from distill_jax.posttraining import (
    Pair,
    RewardModelConfig,
    encode_prompt,
    end_of_turn,
    pair_rows,
    preference_accuracy,
    reward_loss,
    reward_of,
    reward_token,
)

PAIRS = [
    Pair([1, 2, 3], [4, 5], [6, 7, 8, 9]),
    Pair([1, 2], [10, 11, 12], [13]),
    Pair([3], [14], [15, 16]),
]
TOKEN = 20
ROWS = pair_rows(PAIRS, RewardModelConfig(sequence_length=8))
BATCH = {name: np.stack([row[name] for row in ROWS]) for name in ROWS[0]}


@pytest.fixture(scope="module")
def model(random_model) -> models.Model:
    return random_model(24, seed=2)


def plain_scores(config, params) -> jax.Array:
    """[pairs, 2]: the logit of the token behind each answer, from whole logits."""
    sequences = [pair.prompt + half for pair in PAIRS for half in (pair.chosen, pair.rejected)]
    tokens = np.zeros((len(sequences), 8), np.int32)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = sequence
    table = models.logits(config, params, jnp.asarray(tokens))
    picked = [table[row, len(sequence) - 1, TOKEN] for row, sequence in enumerate(sequences)]
    return jnp.stack(picked).reshape(-1, 2)


@pytest.mark.slow
def test_loss_terms_and_gradient_are_bradley_terrys_on_the_last_logits(model):
    plain, along = jax.vjp(jax.jit(functools.partial(plain_scores, model.config)), model.params)
    exact = np.asarray(plain, np.float64)
    margin = exact[:, 0] - exact[:, 1]
    assert 0 < (margin > 0).sum() < len(PAIRS)  # so that accuracy is at stake

    @functools.partial(jax.grad, has_aux=True)
    def ours(params):
        totals = reward_loss(model.config, TOKEN)(params, BATCH, jnp.int32(0))
        return totals.loss, totals

    gradient, totals = jax.jit(ours)(model.params)
    np.testing.assert_allclose(totals.loss, -log_expit(margin).sum(), rtol=1e-5)
    assert totals.weight == len(PAIRS)
    expected = {
        "chosen_score": exact[:, 0],
        "rejected_score": exact[:, 1],
        "score_margin": margin,
        "score_accuracy": margin > 0,
    }
    assert totals.terms.keys() == expected.keys()
    for name, term in expected.items():
        np.testing.assert_allclose(totals.terms[name], term.sum(), rtol=1e-4, err_msg=name)
    outer = -expit(-margin)[:, None] * [1, -1]
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5),
        gradient,
        along(jnp.asarray(outer, jnp.float32))[0],
    )


@pytest.mark.slow
def test_eight_devices_give_what_one_gives(model, split):
    pairs = [Pair([1, 2, index], [3 + index], [12, 5 + index]) for index in range(8)]
    rows = pair_rows(pairs, RewardModelConfig(sequence_length=8))
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def gradient(params, mesh=None):
        totals = reward_loss(model.config, TOKEN, mesh=mesh)(params, batch, jnp.int32(0))
        return totals.loss, totals

    mesh = parallel.make_mesh()
    assert parallel.row_shards(mesh) == 8
    spread = split(model, mesh).params
    one, eight = (
        jax.jit(jax.grad(functools.partial(gradient, mesh=on), has_aux=True))(params)
        for on, params in ((None, model.params), (mesh, spread))
    )
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6), eight, one
    )


@pytest.mark.parametrize(("pairs_per_batch", "devices"), [(2, 1), (8, 1), (1, 8)])
def test_accuracy_counts_each_pair_once(model, split, pairs_per_batch, devices):
    scores = np.asarray(jax.jit(plain_scores, static_argnums=0)(model.config, model.params))
    mesh = None if devices == 1 else parallel.make_mesh()
    judge = model if mesh is None else split(model, mesh)
    found = preference_accuracy(judge, TOKEN, ROWS, pairs_per_batch=pairs_per_batch, mesh=mesh)
    assert found == (scores[:, 0] > scores[:, 1]).mean()


@pytest.mark.slow
def test_as_a_reward_it_scores_the_text_and_its_end(tokenizer, random_model):
    model = random_model(tokenizer.vocab_size)
    prompts = [[{"role": "user", "content": text}] for text in ("2 + 2?", "Say a", "And b?")]
    completions = ["4", "a and then b", ""]
    scores = reward_of(model, tokenizer, rows_per_batch=2)(prompts, completions, [""] * 3)
    for prompt, completion, score in zip(prompts, completions, scores, strict=True):
        tokens = encode_prompt(tokenizer, prompt) + tokenizer.encode(completion)
        tokens.append(end_of_turn(tokenizer))
        padded = jnp.asarray([tokens + [0] * (128 - len(tokens))])
        logits = models.logits(model.config, model.params, padded)[0, len(tokens) - 1]
        np.testing.assert_allclose(score, logits[reward_token(tokenizer)], rtol=1e-4, atol=1e-5)


def test_the_score_is_never_read_from_what_ends_a_turn(tokenizer, monkeypatch):
    assert reward_token(tokenizer) == tokenizer.pad_id
    monkeypatch.setattr(tokenizer, "pad_id", end_of_turn(tokenizer))
    monkeypatch.setattr(tokenizer, "bos_id", 7)
    assert reward_token(tokenizer) == 7
    monkeypatch.setattr(tokenizer, "bos_id", None)
    with pytest.raises(InputError, match="no token for its score"):
        reward_token(tokenizer)


def test_pairs_of_one_prompt_are_held_out_together():
    config = RewardModelConfig(pairs="a.jsonl", held_out=0.25)
    pairs = [Pair([index], [1], [2]) for index in range(400)]
    drawn = [config.is_held_out(pair) for pair in pairs]
    assert drawn == [config.is_held_out(pair._replace(chosen=[3])) for pair in pairs]
    assert 70 <= sum(drawn) <= 130  # 100, and 3.5 standard deviations of 8.7
    assert not any(RewardModelConfig(held_out=0.0).is_held_out(pair) for pair in pairs)
    with pytest.raises(InputError, match=r"held_out is 1\.0"):
        RewardModelConfig(held_out=1.0)
