"""The next tokens that a model thinks of: its dark knowledge, for people to look at."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import parallel
from distill_jax.artifacts import InputError
from distill_jax.data import Tokenizer
from distill_jax.evaluation.evaluate import forward
from distill_jax.models import Model, unembedding

_LENGTH_STEP = 32


@dataclasses.dataclass(frozen=True)
class NextToken:
    """One candidate.

    Attributes:
      token: its id.
      text: what it decodes to.
      probability: the model's, over the whole vocabulary.
    """

    token: int
    text: str
    probability: float


def next_tokens(model: Model, tokenizer: Tokenizer, prompt: str, k: int = 5) -> list[NextToken]:
    """The `k` likeliest next tokens after `prompt`, likeliest first.

    Args:
      model: who is asked.
      tokenizer: its tokenizer; opens the text with `bos_id` if the model was trained so.
      prompt: the text so far.
      k: how many.

    Raises:
      InputError: the prompt has no token, or `k` is not within the vocabulary.
    """
    ids = tokenizer.encode(prompt, bos=tokenizer.adds_bos)
    if not ids:
        raise InputError(f"prompt {prompt!r} has no tokens")
    if not 1 <= k <= model.config.vocab_size:
        raise InputError(f"k is {k}, outside 1..{model.config.vocab_size}")
    # Padded to a few lengths, so that few prompts compile anything.
    length = -(-len(ids) // _LENGTH_STEP) * _LENGTH_STEP
    tokens, segment_ids = np.zeros((2, 1, length), np.int32)
    tokens[0, : len(ids)], segment_ids[0, : len(ids)] = ids, 1
    hidden_D = forward(model.config, model.params, tokens, segment_ids)[0, 0, len(ids) - 1]
    logits_V = jnp.matmul(hidden_D, unembedding(model.params), preferred_element_type=jnp.float32)
    probs, best = parallel.to_host(jax.lax.top_k(jax.nn.softmax(logits_V), k))
    return [
        NextToken(token, tokenizer.decode([token]), probability)
        for token, probability in zip(best.tolist(), probs.tolist())
    ]
