"""The compiled steps of generation: reading prompts, and writing tokens for rows side by side.

All rows write to one slot of the cache, which moves on by one a step, so that the cache is updated
in place. A row's text is what lies between the row's first slot and this one; a row that joins
later has its prompt laid so that it ends there. So the programs depend on a few sizes alone, and
a step costs what the longest row needs.

Dimensions: R rows, U prompts read at once, P prompt slots, S cache slots, T steps, M models (the
one that writes, and a teacher); the rest as in `llama`.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from distill_jax.models import decode_step
from distill_jax.models.config import LlamaConfig
from distill_jax.models.decode_step import Cache, Weights
from distill_jax.models.llama import (
    Params,
    merge,
    segment_attention,
    segment_positions,
    unembedding,
)
from distill_jax.models.sampling import Sampling, draw

STEPS = 32
"""Most steps of one call of `extend`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What the programs are compiled for.

    Attributes:
      configs: of the model that writes, and of the teacher if there is one.
      sampling: how tokens are drawn.
      teacher_share: the teacher's part of the mixture that is drawn from.
      rows: how rows lie on devices.
      caches: how each model's keys and values do, [R, K, ., .].
      weights: how the weights of `arrange` do; None leaves one's to JAX.
    """

    configs: tuple[LlamaConfig, ...]
    sampling: Sampling
    teacher_share: float
    rows: jax.sharding.Sharding | None
    caches: tuple[jax.sharding.Sharding | None, ...]
    weights: tuple[Weights | None, ...]


class Rows(NamedTuple):
    """The rows between two steps. The last token of each is not in the caches yet."""

    seed_R: Array
    start_R: Array
    count_R: Array
    token_R: Array
    done_R: Array
    caches: tuple[tuple[Cache, ...], ...]


class Prompts(NamedTuple):
    """Prompts that were read: lengths, and each model's next logits, keys and values."""

    length_U: Array
    logits_MUV: tuple[Array, ...]
    caches: tuple[tuple[Cache, ...], ...]


class Written(NamedTuple):
    """New tokens, -1 where a row has none, and their log-probabilities under each model."""

    token_RT: Array
    log_prob_MRT: Array


@functools.partial(jax.jit, static_argnames="setup")
def arrange(setup: Setup, params: tuple[Params, ...]) -> tuple[Weights, ...]:
    """The models' weights as `extend` uses them: a copy of all layers."""
    arranged = map(decode_step.arrange, setup.configs, params)
    return tuple(
        weights if places is None else jax.lax.with_sharding_constraint(weights, places)
        for weights, places in zip(arranged, setup.weights)
    )


@functools.partial(jax.jit, static_argnames=("setup", "rows", "slots"))
def empty(setup: Setup, params: tuple[Params, ...], rows: int, slots: int) -> Rows:
    """Rows that are done, with room for `slots` tokens in each."""

    def caches(config: LlamaConfig, tree: Params) -> tuple[Cache, ...]:
        heads, size = (rows, config.kv_heads), config.head_dim
        dtype = tree["layers"]["attention"]["key"].dtype
        return tuple(
            Cache(jnp.zeros((*heads, size, slots), dtype), jnp.zeros((*heads, slots, size), dtype))
            for _ in range(config.layers)
        )

    # One array each: what takes them uses them up.
    empty_rows = Rows(
        seed_R=jnp.zeros(rows, jnp.uint32),
        start_R=jnp.zeros(rows, jnp.int32),
        count_R=jnp.zeros(rows, jnp.int32),
        token_R=jnp.zeros(rows, jnp.int32),
        done_R=jnp.ones(rows, bool),
        caches=tuple(map(caches, setup.configs, params)),
    )
    return _lay(setup, empty_rows)


@functools.partial(jax.jit, static_argnames="setup")
def read(setup: Setup, params: tuple[Params, ...], prompts_UP: Array, length_U: Array) -> Prompts:
    """Runs the prompts, each at the end of its row, through the models."""
    slots = prompts_UP.shape[1]
    segments_UP = (jnp.arange(slots) >= slots - length_U[:, None]).astype(jnp.int32)
    within = segment_attention(segments_UP, rows=setup.rows)

    def attend(query: Array, key: Array, value: Array, _: Any) -> tuple[Array, Any]:
        heads, _ = within(query, key, value, None)
        return heads, Cache(key.transpose(0, 2, 3, 1), value.swapaxes(1, 2))

    logits, caches = [], []
    for config, tree in zip(setup.configs, params):
        model = merge(config, tree)
        hidden_UPD, stacked, _ = model(prompts_UP, segment_positions(segments_UP), attend)
        logits.append(
            jnp.einsum(
                "UD,DV->UV",
                hidden_UPD[:, -1],
                unembedding(tree),
                preferred_element_type=jnp.float32,
            )
        )
        caches.append(decode_step.unstack(stacked, config.layers))
    return Prompts(length_U, tuple(logits), tuple(caches))


@functools.partial(jax.jit, static_argnames="setup", donate_argnames="rows")
def admit(
    setup: Setup,
    rows: Rows,
    prompts: Prompts,
    slot: Array,
    source_R: Array,
    seed_R: Array,
    stop_ids: Array,
    limit: Array,
) -> tuple[Rows, Written]:
    """Begins texts: row r with prompt `source_R[r]` and its first token; -1 leaves a row alone.

    Args:
      setup: what this is compiled for.
      rows: are used up.
      prompts: of which some begin.
      slot: where the next token of all rows goes; at least P.
      source_R: which of the prompts.
      seed_R: of the texts that begin.
      stop_ids: tokens that end a text.
      limit: most new tokens of a text.
    """
    new_R = source_R >= 0

    def place(past: Array, read: Array, axis: int) -> Array:
        size = read.shape[axis]
        old = jax.lax.dynamic_slice_in_dim(past, slot - size, size, axis)
        chosen = jnp.where(new_R[:, None, None, None], read[source_R], old)
        return jax.lax.dynamic_update_slice_in_dim(past, chosen, slot - size, axis)

    caches = tuple(
        tuple(
            Cache(place(past.key_RKCS, new.key_RKCS, 3), place(past.value_RKSC, new.value_RKSC, 2))
            for past, new in zip(*layers)
        )
        for layers in zip(rows.caches, prompts.caches)
    )
    begun = Rows(
        seed_R=jnp.where(new_R, seed_R, rows.seed_R),
        start_R=jnp.where(new_R, slot - prompts.length_U[source_R], rows.start_R),
        count_R=jnp.where(new_R, 0, rows.count_R),
        token_R=rows.token_R,
        done_R=~new_R,
        caches=caches,
    )
    logits = [one[source_R] for one in prompts.logits_MUV]
    begun, token_R, log_prob_MR = _write(setup, begun, logits, stop_ids, limit)
    begun = begun._replace(done_R=jnp.where(new_R, begun.done_R, rows.done_R))
    return _lay(setup, begun), Written(token_R[:, None], log_prob_MR[..., None])


@functools.partial(jax.jit, static_argnames="setup", donate_argnames="rows")
def extend(
    setup: Setup,
    weights: tuple[Weights, ...],
    rows: Rows,
    slot: Array,
    stop_ids: Array,
    limit: Array,
    steps: Array,
    enough_done: Array,
) -> tuple[Rows, Written, Array]:
    """Adds tokens to the rows that are not done.

    Args:
      setup: what this is compiled for.
      weights: of the models.
      rows: are used up.
      slot: where the next token of all rows goes.
      stop_ids: tokens that end a text.
      limit: most new tokens of a text.
      steps: most tokens to add to a row; at most STEPS, and as many slots must be left.
      enough_done: ends earlier once so many rows are done.

    Returns:
      The rows, what was written [., T = STEPS], and how many steps were taken.
    """

    def unfinished(state: tuple[Array, Rows, Written]) -> Array:
        step, rows, _ = state
        return (step < steps) & (jnp.sum(rows.done_R) < enough_done)

    def one(state: tuple[Array, Rows, Written]) -> tuple[Array, Rows, Written]:
        step, rows, written = state
        rows, logits = _decode(setup, weights, rows, slot + step)
        rows, token_R, log_prob_MR = _write(setup, rows, logits, stop_ids, limit)
        written = Written(
            written.token_RT.at[:, step].set(token_R),
            written.log_prob_MRT.at[:, :, step].set(log_prob_MR),
        )
        return step + 1, rows, written

    shape = (rows.done_R.shape[0], STEPS)
    none = Written(jnp.full(shape, -1, jnp.int32), jnp.zeros((len(weights), *shape), jnp.float32))
    step, rows, written = jax.lax.while_loop(unfinished, one, (jnp.int32(0), rows, none))
    return _lay(setup, rows), written, step


@functools.partial(jax.jit, static_argnames=("setup", "slots"))
def move(setup: Setup, rows: Rows, shift: Array, *, slots: int) -> Rows:
    """Rows with room for `slots` tokens, all of them `shift` slots nearer to the first one."""

    def moved(past: Array, axis: int) -> Array:
        more = [(0, 0)] * past.ndim
        more[axis] = (0, slots - past.shape[axis])
        # What comes round from the other end lies where no row's text is.
        return jnp.roll(jnp.pad(past, more), -shift, axis)

    caches = tuple(
        tuple(Cache(moved(layer.key_RKCS, 3), moved(layer.value_RKSC, 2)) for layer in layers)
        for layers in rows.caches
    )
    return _lay(setup, rows._replace(start_R=rows.start_R - shift, caches=caches))


def _lay(setup: Setup, rows: Rows) -> Rows:
    """Keeps rows where `setup` wants them, so that the next program finds them as the last did."""

    def pin(leaf: Array, sharding: jax.sharding.Sharding | None) -> Array:
        return leaf if sharding is None else jax.lax.with_sharding_constraint(leaf, sharding)

    caches = tuple(
        jax.tree.map(functools.partial(pin, sharding=sharding), cache)
        for cache, sharding in zip(rows.caches, setup.caches)
    )
    vectors = jax.tree.map(lambda leaf: pin(leaf, setup.rows), rows._replace(caches=()))
    return vectors._replace(caches=caches)


def _write(
    setup: Setup, rows: Rows, logits_MRV: list[Array], stop_ids: Array, limit: Array
) -> tuple[Rows, Array, Array]:
    """Draws the next token of every row: (rows, tokens [R] or -1, log-probabilities [M, R])."""
    keys_R = jax.vmap(jax.random.key)(rows.seed_R)
    keys_R = jax.vmap(jax.random.fold_in)(keys_R, rows.count_R)
    log_sum_MR1 = [jax.nn.logsumexp(one, axis=-1, keepdims=True) for one in logits_MRV]
    drawn_from_RV = logits_MRV[0]
    if len(logits_MRV) == 2:
        student_RV, teacher_RV = (one - total for one, total in zip(logits_MRV, log_sum_MR1))
        share = setup.teacher_share
        drawn_from_RV = jnp.logaddexp(teacher_RV + math.log(share), student_RV + math.log1p(-share))
    token_R = draw(drawn_from_RV, keys_R, setup.sampling)
    log_prob_MR = jnp.stack(
        [
            (jnp.take_along_axis(one, token_R[:, None], axis=-1) - total)[:, 0]
            for one, total in zip(logits_MRV, log_sum_MR1)
        ]
    )
    live_R = ~rows.done_R
    count_R = rows.count_R + live_R
    done_R = rows.done_R | jnp.isin(token_R, stop_ids) | (count_R >= limit)
    written_R = jnp.where(live_R, token_R, -1)
    token_R = jnp.where(live_R, token_R, rows.token_R)
    rows = rows._replace(count_R=count_R, token_R=token_R, done_R=done_R)
    return rows, written_R, log_prob_MR


def _decode(
    setup: Setup, weights: tuple[Weights, ...], rows: Rows, slot: Array
) -> tuple[Rows, list[Array]]:
    """Puts every row's last token into the caches, at `slot`; each model's next logits [R, V]."""
    logits, caches = [], []
    for config, model, past in zip(setup.configs, weights, rows.caches):
        logits_RV, new = decode_step.forward(config, model, past, rows.token_R, rows.start_R, slot)
        logits.append(logits_RV)
        caches.append(new)
    return rows._replace(caches=tuple(caches)), logits
