import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import models
from distill_jax.artifacts import InputError
from distill_jax.posttraining import (
    SftConfig,
    demonstrations,
    encode_chat,
    load_task,
    sft_loss,
    sft_rows,
)


def test_the_loss_is_the_cross_entropy_of_each_answer_alone(tokenizer, random_model):
    model = random_model(tokenizer.vocab_size)
    config, params = model.config, model.params
    conversations = demonstrations(load_task("sums").train[:3])
    rows = sft_rows(tokenizer, conversations, SftConfig(sequence_length=128))
    assert len(rows) < len(conversations)  # so that packing is at stake
    batch = {name: jnp.stack([row[name] for row in rows]) for name in rows[0]}
    totals = jax.jit(sft_loss(config))(params, batch, jnp.int32(0))

    expected = count = 0.0
    forward = jax.jit(lambda tokens: models.logits(config, params, tokens)[0])
    for conversation in conversations:
        tokens, where = encode_chat(tokenizer, conversation)
        padded = tokens + [0] * (64 - len(tokens))  # behind, where causal attention ignores it
        logits = np.asarray(forward(jnp.asarray([padded])), np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for time in np.flatnonzero(where):
            expected -= log_probs[time - 1, tokens[time]]
            count += 1
    np.testing.assert_allclose(totals.loss, expected, rtol=1e-5)
    assert totals.weight == count


def test_a_bad_conversation_is_named(tokenizer):
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    bad = [{"role": "user", "content": "a"}, {"content": "b"}]
    with pytest.raises(InputError, match="conversation 1: message 1: field 'role' is missing"):
        sft_rows(tokenizer, [good, bad])
    with pytest.raises(InputError, match=r"example 0: .* tokens do not fit in 8"):
        sft_rows(tokenizer, [good], SftConfig(sequence_length=8))
