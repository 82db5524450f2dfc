"""Next tokens against a plain softmax in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import data, models
from distill_jax.artifacts import InputError
from distill_jax.evaluation import next_tokens


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer(["the cat sat on the mat", "the dog sat on the log"] * 9, 280)


@pytest.fixture(scope="module")
def model(tokenizer):
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
    return models.Model(config, params)


@pytest.mark.slow
def test_likeliest_first_and_over_the_whole_vocabulary(model, tokenizer):
    prompt = "the cat sat on the"
    ids = tokenizer.encode(prompt, bos=True)
    assert tokenizer.adds_bos
    logits = models.logits(model.config, model.params, jnp.asarray([ids]))[0, -1]
    weights = np.exp(np.asarray(logits, np.float64))
    expected = weights / weights.sum()
    found = next_tokens(model, tokenizer, prompt, k=4)
    assert [one.token for one in found] == np.argsort(-expected)[:4].tolist()
    np.testing.assert_allclose(
        [one.probability for one in found], np.sort(expected)[::-1][:4], rtol=1e-4
    )
    assert [one.text for one in found] == [tokenizer.decode([one.token]) for one in found]


def test_bad_requests_are_named(model, tokenizer):
    with pytest.raises(InputError, match=r"k is 0, outside 1\.\."):
        next_tokens(model, tokenizer, "the", k=0)
    tokenizer = data.train_tokenizer(["abc"], 280)
    tokenizer.adds_bos = False
    with pytest.raises(InputError, match="prompt '' has no tokens"):
        next_tokens(model, tokenizer, "")
