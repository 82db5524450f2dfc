"""The gradient of an objective that only looks ids up, without an array of logits for every term.

A sparse objective sees the logits through `sparse.pick` alone: logits at some ids, log-sum-exps.
Its gradient by the logits is then a few softmaxes, each scaled by a number per token, and other
values at the ids. Automatic differentiation makes [N, V] for every term and adds them up. Here the
derivatives by what was looked up, [N, K] and [N], are taken first. The softmaxes are then one
elementwise pass, in the dtype that the products want, and the values at the ids, complete and in
float32 until then, replace what stands there: nothing is added up in a narrow dtype.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.losses import sparse

_ROWS, _COLUMNS = 8, 128  # of a float32 tile on a TPU


def result_and_gradient(
    loss: Callable[[Any], tuple[jax.Array, Any]],
    logits_NV: jax.Array,
    where_N: jax.Array,
    dtype: Any,
    *,
    split: bool,
) -> tuple[Any, jax.Array]:
    """What `loss` returns beside its value, and the value's gradient by the logits in `dtype`.

    Args:
      loss: maps logits, or a `sparse.Lookups` in their place, to (scalar, anything).
      logits_NV: float32 [N, V].
      where_N: tokens of weight 0 have no gradient, be they NaN.
      dtype: of the gradient, which is float32 until it is rounded once.
      split: whether the vocabulary is split over devices.
    """

    def cut(values):  # 0 * NaN would pass where a weight of 0 alone was to stop it
        nothing = (where_N == 0).reshape(-1, *[1] * (values.ndim - 1))
        return jnp.where(nothing, 0.0, values)

    asked = sparse.Lookups(cut(logits_NV))
    try:
        loss(asked)
        if _few(asked.made, logits_NV.shape[1]):
            seen = _look_up(asked, split)
            bars, result = jax.grad(
                lambda answers: loss(asked.answering(jax.tree.map(cut, answers))), has_aux=True
            )([(lookup.picked, lookup.log_sum) for lookup in seen.lookups])
            return result, _spread(seen, bars, dtype, split)
    except Exception:
        pass  # What an objective cannot do with the stand-in, it can with logits.
    gradient_NV, result = jax.grad(lambda logits: loss(cut(logits)), has_aux=True)(logits_NV)
    return result, gradient_NV.astype(dtype)


def _few(lookups: Sequence[sparse.Lookup], vocabulary: int) -> bool:
    """Whether comparing all ids with each other costs less than a pass over the vocabulary."""
    return 0 < sum(lookup.ids.shape[-1] for lookup in lookups) ** 2 <= vocabulary


class _Answered(NamedTuple):
    """A lookup of temperature T and its answer.

    Attributes:
      temperature: T.
      sums_NU: which of all ids its log-sum-exp counts.
      picked: [N, K].
      log_sum: [N].
    """

    temperature: float | jax.Array
    sums_NU: jax.Array
    picked: jax.Array
    log_sum: jax.Array


class _Seen(NamedTuple):
    """What all lookups together see of logits.

    Attributes:
      rest_NV: logits less the largest one; -inf at all ids if some lookup excludes ids.
      ids_NU: the ids of all lookups.
      logits_NU: the logits there, less the largest one.
      lookups: their answers.
    """

    rest_NV: jax.Array
    ids_NU: jax.Array
    logits_NU: jax.Array
    lookups: list[_Answered]


def _look_up(asked: sparse.Lookups, split: bool) -> _Seen:
    """Answers all lookups with one gather, and one scatter if any of them excludes ids.

    The logits outside all ids are summed once for a temperature; a lookup that excludes other ids
    than another one adds the few that it counts.
    """
    ids_NU = jnp.concatenate([lookup.ids for lookup in asked.made], axis=-1)
    raw_NU = sparse.take(asked.logits, ids_NU)
    # Looked up before anything is overwritten, so that no second array of logits is needed.
    raw_NU, rest_NV = jax.lax.optimization_barrier((raw_NU, asked.logits))
    some_excluded = any(lookup.exclude for lookup in asked.made)
    if some_excluded:
        rest_NV = _set(rest_NV, ids_NU, jnp.full_like(raw_NU, -jnp.inf), split)
    rest_NV, logits_NU = rest_NV - asked.largest[:, None], raw_NU - asked.largest[:, None]
    valid_NU = ids_NU < asked.shape[1]
    first_NU = valid_NU & ~jnp.any(jnp.tril(_equal(ids_NU, ids_NU), -1), axis=-1)

    def answer(lookup: sparse.Lookup, start: int) -> _Answered:
        softened_NU = logits_NU / lookup.temperature
        sums_NU = jnp.ones_like(valid_NU)
        log_sum, *_ = sparse.log_sum_exp(
            rest_NV / lookup.temperature, None if some_excluded else 0.0
        )
        if lookup.exclude:
            sums_NU = ~jnp.any(_equal(ids_NU, lookup.ids), axis=-1)
        if some_excluded:
            beside_NU = jnp.where(first_NU & sums_NU, softened_NU, -jnp.inf)
            log_sum = jax.nn.logsumexp(jnp.append(beside_NU, log_sum[:, None], axis=-1), axis=-1)
        picked = softened_NU[:, start : start + lookup.ids.shape[-1]]
        return _Answered(lookup.temperature, sums_NU, picked, log_sum)

    starts = itertools.accumulate((lookup.ids.shape[-1] for lookup in asked.made), initial=0)
    answers = [answer(lookup, start) for lookup, start in zip(asked.made, starts, strict=False)]
    return _Seen(rest_NV, ids_NU, logits_NU, answers)


def _spread(seen: _Seen, bars: Sequence[Any], dtype: Any, split: bool) -> jax.Array:
    """The gradient [N, V] from the derivatives by each lookup's answer."""
    everywhere, at_ids, picked_bars = [], [], []
    for lookup, (picked_bar, log_sum_bar) in zip(seen.lookups, bars, strict=True):
        softmax = _softmax(lookup, log_sum_bar)
        everywhere.append(softmax(seen.rest_NV))
        at_ids.append(jnp.where(lookup.sums_NU, softmax(seen.logits_NU), 0.0))
        picked_bars.append(picked_bar / lookup.temperature)
    bars_N1U = jnp.concatenate(picked_bars, axis=-1)[:, None, :]
    # An id may stand in several lookups, and more than once in one of them.
    at_ids.append(jnp.sum(jnp.where(_equal(seen.ids_NU, seen.ids_NU), bars_N1U, 0.0), axis=-1))
    total_NV, total_NU = (functools.reduce(jnp.add, parts) for parts in (everywhere, at_ids))
    return _set(total_NV.astype(dtype), seen.ids_NU, total_NU.astype(dtype), split)


def _equal(ids_NU: jax.Array, others_NK: jax.Array) -> jax.Array:
    """[N, U, K]."""
    return ids_NU[:, :, None] == others_NK[:, None, :]


def _softmax(lookup: _Answered, log_sum_bar: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """From logits [N, ...] the derivative by them of a lookup's log-sum-exp."""
    nothing = jnp.isneginf(lookup.log_sum)
    scale = jnp.where(nothing, 0.0, log_sum_bar / lookup.temperature)[:, None]
    shift = jnp.where(nothing, 0.0, lookup.log_sum)[:, None]
    return lambda logits: scale * jnp.exp(logits / lookup.temperature - shift)


def _set(values_NV: jax.Array, ids_NU: jax.Array, updates_NU: jax.Array, split: bool) -> jax.Array:
    """`values.at[ids].set` along the vocabulary; equal ids have equal updates."""
    tokens, vocabulary = values_NV.shape
    arrays = values_NV, ids_NU, updates_NU
    if split or tokens % _ROWS or vocabulary % _COLUMNS:
        return _set_in_rows(*arrays)
    return jax.lax.platform_dependent(*arrays, tpu=_set_in_tiles, default=_set_in_rows)


def _set_in_rows(values_NV: jax.Array, ids_NU: jax.Array, updates_NU: jax.Array) -> jax.Array:
    return sparse.at(values_NV, ids_NU, "set", updates_NU)


def _set_in_tiles(values_NV: jax.Array, ids_NU: jax.Array, updates_NU: jax.Array) -> jax.Array:
    """A scatter into one axis, which is what a TPU does in place.

    The axis is [N, V] in the order in which its tiles lie in memory, so that no bytes move.
    """
    tokens, vocabulary = values_NV.shape
    rows, columns = tokens // _ROWS, vocabulary // _COLUMNS
    row_N1 = jnp.arange(tokens)[:, None]
    tile_NU = row_N1 // _ROWS * columns + ids_NU // _COLUMNS
    place_NU = (tile_NU * _ROWS + row_N1 % _ROWS) * _COLUMNS + ids_NU % _COLUMNS
    place_NU = jnp.where(ids_NU < vocabulary, place_NU, tokens * vocabulary)
    flat = values_NV.reshape(rows, _ROWS, columns, _COLUMNS).swapaxes(1, 2).reshape(-1)
    flat = flat.at[place_NU.reshape(-1)].set(updates_NU.reshape(-1), mode="drop")
    return flat.reshape(rows, columns, _ROWS, _COLUMNS).swapaxes(1, 2).reshape(tokens, vocabulary)
