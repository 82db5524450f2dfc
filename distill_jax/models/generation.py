"""Generating text with a key/value cache.

All randomness of a row comes from the row's own seed: its text is the same whatever is generated
beside it, up to the rounding of float arithmetic.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax

from distill_jax.artifacts import InputError
from distill_jax.models import batching, decoding
from distill_jax.models.config import LlamaConfig
from distill_jax.models.llama import Model
from distill_jax.models.sampling import Sampling

_SEEDS = 2**32
_STREAMED_STEPS = 4


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was generated after one prompt.

    Attributes:
      tokens: the new ids, with the stop id that ended them if one did.
      log_probs: natural log-probability of each token under the model itself, at temperature 1 and
        with nothing cut off, whatever it was drawn from.
      finished: whether a stop id came before `max_new_tokens` ran out.
      teacher_log_probs: the same under the teacher, if one took part.
    """

    tokens: list[int]
    log_probs: list[float]
    finished: bool
    teacher_log_probs: list[float] | None = None


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seeds: Sequence[int],
    stop_ids: Sequence[int] = (),
    batch_rows: int = 32,
    sharding: jax.sharding.Sharding | None = None,
    teacher: Model | None = None,
    teacher_share: float = 0.2,
    on_tokens: Callable[[int, list[int]], None] | None = None,
) -> list[Completion]:
    """Continues each prompt until a stop id or `max_new_tokens`.

    A prompt that stands there several times, as it does when several samples are wanted of it, is
    read once. When a text ends, a waiting prompt takes its row (`batching`).

    With a teacher, tokens are drawn from a p_teacher + (1 - a) q_model, a = `teacher_share`:
    MiniLLM's teacher-mixed sampling (Gu et al. 2024, section 2.2). The log-probabilities of both
    are what `losses.mix_log_probs` and `losses.importance_weights` need.

    Args:
      model: the model; its parameters may be sharded, and the cache's heads then are as the
        weights of the keys.
      prompts: token ids; lengths may differ.
      max_new_tokens: most tokens to add to a prompt.
      sampling: how tokens are drawn.
      seeds: one number in [0, 2^32) for each prompt, the only source of its randomness.
      stop_ids: tokens that end a text.
      batch_rows: most texts that are written at once, which bounds the memory of the cache.
      sharding: how rows are spread over devices, such as `parallel.batch_sharding(mesh)`. With
        several processes all must pass the same prompts.
      teacher: a model with the same vocabulary.
      teacher_share: its part of the mixture, in (0, 1).
      on_tokens: is called with a prompt's index and its next tokens, a few at a time, as soon as
        they are known.

    Returns:
      A completion for each prompt, in the order of the prompts.

    Raises:
      InputError: an empty or too long prompt, an id outside the vocabulary, a seed out of range; a
        teacher of another vocabulary, or beside a sampling that is not of the plain mixture.
    """
    models = (model,) if teacher is None else (model, teacher)
    if teacher is not None:
        _check_teacher(model, teacher, teacher_share, sampling)
    for one in models:
        _check(one.config, prompts, max_new_tokens, seeds)
    if batch_rows < 1:
        raise InputError(f"batch_rows is {batch_rows}; it must be positive")
    setup = batching.make_setup(models, sampling, teacher_share, sharding)
    batch = batching.Batch(
        setup,
        tuple(one.params for one in models),
        prompts,
        seeds,
        stop_ids,
        max_new_tokens,
        batch_rows,
    )
    tokens: list[list[int]] = [[] for _ in prompts]
    log_probs: list[list[list[float]]] = [[[] for _ in models] for _ in prompts]
    for piece in batch.write(decoding.STEPS if on_tokens is None else _STREAMED_STEPS):
        tokens[piece.text] += piece.tokens
        for so_far, new in zip(log_probs[piece.text], piece.log_probs_MT.tolist()):
            so_far += new
        if on_tokens is not None:
            on_tokens(piece.text, piece.tokens)
    return [
        Completion(ids, under[0], ids[-1] in stop_ids, under[1] if teacher else None)
        for ids, under in zip(tokens, log_probs)
    ]


def _check(
    config: LlamaConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int, seeds: Sequence[int]
) -> None:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; it must be positive")
    if len(seeds) != len(prompts):
        raise InputError(f"{len(prompts)} prompts but {len(seeds)} seeds")
    for row, (prompt, seed) in enumerate(zip(prompts, seeds)):
        if not prompt:
            raise InputError(f"prompt {row} is empty; begin it with the BOS token")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise InputError(
                f"prompt {row} has ids from {min(prompt)} to {max(prompt)}, "
                f"but the vocabulary has {config.vocab_size}"
            )
        if len(prompt) + max_new_tokens > config.context:
            raise InputError(
                f"prompt {row} has {len(prompt)} tokens: with {max_new_tokens} new ones "
                f"it passes the model's context of {config.context}"
            )
        if not 0 <= seed < _SEEDS:
            raise InputError(f"seed {row} is {seed}; it must be in [0, {_SEEDS})")


def _check_teacher(model: Model, teacher: Model, share: float, sampling: Sampling) -> None:
    ours, theirs = model.config.vocab_size, teacher.config.vocab_size
    if ours != theirs:
        raise InputError(f"the teacher's vocabulary has {theirs} tokens, the model's {ours}")
    if not 0 < share < 1:
        raise InputError(f"teacher_share is {share}; it must be in (0, 1)")
    if sampling != Sampling():
        raise InputError(
            f"{sampling} cannot be mixed with a teacher: importance weights are those of the "
            "whole mixture at temperature 1"
        )
