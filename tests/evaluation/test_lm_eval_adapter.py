"""The lm-eval adapter against sums of log-probabilities taken one request at a time."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import data, models

pytest.importorskip("lm_eval")

from distill_jax.evaluation.lm_eval_adapter import DistillJaxLM

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "a frog is on a log"]


@pytest.fixture(scope="module")
def adapter():
    tokenizer = data.train_tokenizer(TEXTS * 9, 280)
    config = models.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        embed=16,
        mlp=24,
        layers=1,
        heads=2,
        kv_heads=1,
        head_dim=8,
        tied=True,
        context=64,
    )
    rng = np.random.default_rng(0)
    shapes = models.abstract_params(config)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.3, p.shape), p.dtype), shapes)
    return DistillJaxLM(models.Model(config, params), tokenizer, max_length=24, batch_rows=2)


def requests(*arguments):
    return [types.SimpleNamespace(args=args) for args in arguments]


def log_probs(adapter, ids):
    model = adapter.model
    logits = np.asarray(models.logits(model.config, model.params, jnp.asarray([ids]))[0], float)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def test_loglikelihood(adapter):
    pairs = [("the cat sat", " on the mat"), ("a", " frog"), ("", "the dog"), ("x", " log log")]
    found = adapter.loglikelihood(requests(*pairs), disable_tqdm=True)
    bos = adapter.tokenizer.bos_id
    for (context, continuation), (log_prob, greedy) in zip(pairs, found, strict=True):
        prefix = [bos, *adapter.tokenizer.encode(context)]
        whole = [bos, *adapter.tokenizer.encode(context + continuation)]
        predicted = log_probs(adapter, whole[:-1])[len(prefix) - 1 :]
        labels = whole[len(prefix) :]
        expected = sum(predicted[i, label] for i, label in enumerate(labels))
        np.testing.assert_allclose(log_prob, expected, rtol=1e-4)
        assert greedy == (predicted.argmax(axis=1).tolist() == labels)


def test_what_the_model_itself_would_say_is_greedy(adapter):
    generated = adapter.generate_until(requests(("the cat", {"until": [], "max_gen_toks": 1})))[0]
    ids = adapter.tok_encode("the cat")
    best = int(log_probs(adapter, ids)[-1].argmax())
    assert generated == adapter.tokenizer.decode([best])
    score = adapter._loglikelihood_tokens([(None, ids, [best]), (None, ids, [best ^ 1])])
    assert [greedy for _, greedy in score] == [True, False]


def test_rolling_predicts_every_token_once(adapter):
    text = "the cat sat on the log " * 5
    ids = adapter.tokenizer.encode(text)
    assert len(ids) > adapter.max_length
    (found,) = adapter.loglikelihood_rolling(requests((text,)))
    expected, size = 0.0, adapter.max_length
    for start in range(0, len(ids), size):
        labels = ids[start : start + size]
        before = [adapter.prefix_token_id] if start == 0 else [ids[start - 1]]
        # lm-eval gives the last window as much context as fits.
        extra = size - len(labels)
        if start and extra:
            before = ids[start - 1 - extra : start]
        predicted = log_probs(adapter, [*before, *labels[:-1]])[len(before) - 1 :]
        expected += sum(predicted[i, label] for i, label in enumerate(labels))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_generation_is_cut_at_the_first_stop_string(adapter):
    options = {"max_gen_toks": 8}
    (whole,) = adapter.generate_until(requests(("the", {**options, "until": []})))
    assert len(whole) > 2
    stop = whole[2]
    (cut,) = adapter.generate_until(requests(("the", {**options, "until": [stop]})))
    assert cut == whole.split(stop)[0]
