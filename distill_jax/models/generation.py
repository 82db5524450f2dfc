"""Generating text with a key/value cache.

Shapes are rounded up to a few sizes, so that requests of many lengths share one compilation. All
randomness of a row comes from the row's own seed: its text is the same whatever is generated
beside it, up to the rounding of float arithmetic.

Dimensions: B rows, P prompt tokens, S cache slots, G query heads per kv head; the rest as in
`llama`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils

from distill_jax.artifacts import InputError
from distill_jax.models.config import LlamaConfig
from distill_jax.models.llama import (
    Attend,
    Model,
    Params,
    merge,
    segment_attention,
    segment_positions,
    unembedding,
)

_SEEDS = 2**32
_SMALLEST_BUCKET = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
      temperature: logits are divided by it; 0 takes the most probable token.
      top_k: draw only from this many most probable tokens; None: from all.
      top_p: then only from the fewest tokens that hold this share of the probability (nucleus
        sampling, Holtzman et al. 2020); None: from all.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise InputError(f"Sampling.temperature is {self.temperature}; it must be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"Sampling.top_k is {self.top_k}; it must be positive")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"Sampling.top_p is {self.top_p}; it must be in (0, 1]")


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was generated after one prompt.

    Attributes:
      tokens: the new ids, with the stop id that ended them if one did.
      log_probs: natural log-probability of each token under the model itself, at temperature 1 and
        with nothing cut off, whatever it was drawn from.
      finished: whether a stop id came before `max_new_tokens` ran out.
    """

    tokens: list[int]
    log_probs: list[float]
    finished: bool


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
) -> list[Completion]:
    """Continues each prompt until a stop id or `max_new_tokens`.

    Args:
      model: the model; its parameters may be sharded.
      prompts: token ids; lengths may differ.
      max_new_tokens: most tokens to add to a prompt.
      sampling: how tokens are drawn.
      seeds: one number in [0, 2^32) for each prompt, the only source of its randomness.
      stop_ids: tokens that end a text.
      batch_rows: most prompts that are run at once, which bounds the memory of the cache.
      sharding: how rows are spread over devices, such as `parallel.batch_sharding(mesh)`. With
        several processes all must pass the same prompts.

    Returns:
      A completion for each prompt, in the order of the prompts.

    Raises:
      InputError: an empty or too long prompt, an id outside the vocabulary, a seed out of range.
    """
    _check(model.config, prompts, max_new_tokens, seeds)
    # Prompts of about the same length waste the least padding.
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    completions: dict[int, Completion] = {}
    for start in range(0, len(order), batch_rows):
        rows = order[start : start + batch_rows]
        batch = _batch([prompts[row] for row in rows], [seeds[row] for row in rows], sharding)
        written = _generate(
            model.config,
            model.params,
            *jax.device_put(batch, sharding),
            jnp.asarray(tuple(stop_ids) or (-1,), jnp.int32),
            max_new_tokens,
            sampling=sampling,
            new_slots=_bucket(max_new_tokens),
        )
        tokens, log_probs, counts, finished = _to_host(written)
        for i, row in enumerate(rows):
            kept = slice(counts[i])
            completions[row] = Completion(
                tokens[i, kept].tolist(), log_probs[i, kept].tolist(), bool(finished[i])
            )
    return [completions[row] for row in range(len(prompts))]


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


def _bucket(size: int) -> int:
    """A size of at least `size` out of four for every doubling; wastes a quarter at most."""
    step = max(_SMALLEST_BUCKET, 1 << max(size.bit_length() - 3, 0))
    return -(-size // step) * step


def _batch(
    prompts: list[Sequence[int]], seeds: list[int], sharding: jax.sharding.Sharding | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(prompts [B, P] padded at the end, lengths [B], seeds [B]); a row added has length 0."""
    rows = 1 << (len(prompts) - 1).bit_length()
    if sharding is not None:
        rows = -(-rows // sharding.num_devices) * sharding.num_devices
    tokens = np.zeros((rows, _bucket(max(map(len, prompts)))), np.int32)
    lengths = np.zeros(rows, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        lengths[row] = len(prompt)
    return tokens, lengths, np.array(seeds + [0] * (rows - len(seeds)), np.uint32)


def _to_host(tree: Any) -> Any:
    def fetch(array: Array) -> np.ndarray:
        if array.is_fully_addressable:
            return np.asarray(array)
        return multihost_utils.process_allgather(array, tiled=True)

    return jax.tree.map(fetch, tree)


class _State(NamedTuple):
    """What a step of decoding hands on: `step` tokens are written, the last of each is `token`."""

    step: Array
    token_B: Array
    done_B: Array
    cache: tuple[Array, Array]
    tokens_BS: Array
    log_probs_BS: Array


@functools.partial(jax.jit, static_argnames=("config", "sampling", "new_slots"))
def _generate(
    config: LlamaConfig,
    params: Params,
    prompts_BP: Array,
    lengths_B: Array,
    seeds_B: Array,
    stop_ids: Array,
    max_new_tokens: Array,
    *,
    sampling: Sampling,
    new_slots: int,
) -> tuple[Array, Array, Array, Array]:
    """(tokens, log_probs, counts, finished) for every row; see `generate`."""
    rows, prompt_slots = prompts_BP.shape
    keys_B = jax.vmap(jax.random.key)(seeds_B)

    def write(state: _State, hidden_BD: Array) -> _State:
        """Draws the next token of every row and notes it."""
        logits_BV = jnp.einsum(
            "BD,DV->BV", hidden_BD, unembedding(params), preferred_element_type=jnp.float32
        )
        step_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, state.step)
        token_B = draw(logits_BV, step_keys_B, sampling)
        log_probs_BV = jax.nn.log_softmax(logits_BV)
        log_prob_B = jnp.take_along_axis(log_probs_BV, token_B[:, None], axis=-1)[:, 0]
        return state._replace(
            step=state.step + 1,
            token_B=token_B,
            done_B=state.done_B | jnp.isin(token_B, stop_ids),
            tokens_BS=state.tokens_BS.at[:, state.step].set(jnp.where(state.done_B, -1, token_B)),
            log_probs_BS=state.log_probs_BS.at[:, state.step].set(log_prob_B),
        )

    def extend(state: _State) -> _State:
        slot = prompt_slots + state.step - 1
        hidden_BD, cache = _decode(
            config, params, state.token_B, lengths_B, slot, prompt_slots, state.cache
        )
        return write(state._replace(cache=cache), hidden_BD)

    def unfinished(state: _State) -> Array:
        return (state.step < max_new_tokens) & ~jnp.all(state.done_B)

    hidden_BD, cache = _prefill(config, params, prompts_BP, lengths_B, new_slots)
    start = _State(
        step=jnp.zeros((), jnp.int32),
        token_B=jnp.zeros(rows, jnp.int32),
        done_B=lengths_B == 0,
        cache=cache,
        tokens_BS=jnp.full((rows, new_slots), -1, jnp.int32),
        log_probs_BS=jnp.zeros((rows, new_slots), jnp.float32),
    )
    end = jax.lax.while_loop(unfinished, extend, write(start, hidden_BD))
    counts_B = jnp.sum(end.tokens_BS >= 0, axis=1)
    return end.tokens_BS, end.log_probs_BS, counts_B, end.done_B


def _prefill(
    config: LlamaConfig, params: Params, prompts_BP: Array, lengths_B: Array, new_slots: int
) -> tuple[Array, tuple[Array, Array]]:
    """The last hidden state [B, D] of each prompt, and keys and values [L, B, K, S, C].

    The first P slots are the prompt's, padding and all; the rest await new tokens.
    """
    real_BP = jnp.arange(prompts_BP.shape[1]) < lengths_B[:, None]
    segments_BP = real_BP.astype(jnp.int32)
    within = segment_attention(segments_BP)

    def attend(query: Array, key: Array, value: Array, _: Any) -> tuple[Array, Any]:
        heads, _ = within(query, key, value, None)
        return heads, (key.swapaxes(1, 2), value.swapaxes(1, 2))

    hidden_BPD, cache, _ = merge(config, params)(prompts_BP, segment_positions(segments_BP), attend)
    last_B = jnp.maximum(lengths_B - 1, 0)
    hidden_BD = jnp.take_along_axis(hidden_BPD, last_B[:, None, None], axis=1)[:, 0]
    room = [(0, 0)] * 3 + [(0, new_slots), (0, 0)]
    return hidden_BD, jax.tree.map(lambda x: jnp.pad(x, room), cache)


def _decode(
    config: LlamaConfig,
    params: Params,
    token_B: Array,
    lengths_B: Array,
    slot: Array,
    prompt_slots: int,
    cache: tuple[Array, Array],
) -> tuple[Array, tuple[Array, Array]]:
    """The hidden state [B, D] of one more token in every row, and the cache with it at `slot`.

    All rows write to the same slot, so that the cache is updated in place; between a short
    prompt's end and the first new token lie unused slots, which positions do not count.
    """
    slots = jnp.arange(cache[0].shape[3])
    filled_BS = (slots < lengths_B[:, None]) | ((slots >= prompt_slots) & (slots < slot))
    positions_B = lengths_B + slot - prompt_slots
    hidden_B1D, new, _ = merge(config, params)(
        token_B[:, None], positions_B[:, None], _cached_attention(filled_BS), cache
    )
    cache = jax.tree.map(
        lambda past, one: jax.lax.dynamic_update_slice_in_dim(past, one, slot, axis=3), cache, new
    )
    return hidden_B1D[:, 0], cache


def _cached_attention(filled_BS: Array) -> Attend:
    """Attention of one new token to the cache's filled slots and to itself.

    Layers only read the cache and return the new token's key and value [B, K, 1, C]: the caller
    writes those of all layers at once, instead of copying the whole cache in every step.
    """

    def attend(query: Array, key: Array, value: Array, cache: Any) -> tuple[Array, Any]:
        key_BKSC, value_BKSC = cache
        rows, _, heads, head_dim = query.shape
        query_BKGC = query.reshape(rows, key_BKSC.shape[1], -1, head_dim) * head_dim**-0.5
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
        scores = functools.partial(
            jnp.einsum, "BKGC,BKSC->BKGS", query_BKGC, preferred_element_type=jnp.float32
        )
        past = jnp.where(filled_BS[:, None, None], scores(key_BKSC), -jnp.inf)
        weights = jax.nn.softmax(jnp.concatenate((past, scores(key)), axis=-1)).astype(value.dtype)
        out = jnp.einsum("BKGS,BKSC->BKGC", weights[..., :-1], value_BKSC)
        out += weights[..., -1:] * value
        return out.reshape(rows, 1, heads, head_dim), (key, value)

    return attend


def draw(logits_BV: Array, keys_B: Array, sampling: Sampling) -> Array:
    """One token id for every row, by the Gumbel-max trick with the row's own key."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1)
    logits_BV = truncate(logits_BV / sampling.temperature, sampling)
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(keys_B)
    return jnp.argmax(logits_BV + noise_BV, axis=-1)


def truncate(logits_BV: Array, sampling: Sampling) -> Array:
    """Logits with -inf in place of what top-k, then top-p, exclude; ties with the last stay."""
    vocab = logits_BV.shape[-1]
    if sampling.top_k is not None and sampling.top_k < vocab:
        least = jax.lax.top_k(logits_BV, sampling.top_k)[0][..., -1:]
        logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered = jnp.sort(logits_BV, axis=-1, descending=True)
        share = jax.nn.softmax(ordered)
        kept = jnp.cumsum(share, axis=-1) - share < sampling.top_p
        least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)
    return logits_BV
