"""The gradient of an objective that only looks ids up, without an array of logits for every term.

A sparse objective sees the logits through `sparse.pick` alone: logits at some ids, log-sum-exps.
Its gradient by the logits is then a few softmaxes, each scaled by a number per token, and other
values at the ids. Automatic differentiation makes [N, V] for every term and adds them up. Here the
derivatives by what was looked up, [N, K] and [N], are taken first. The softmaxes are then one
elementwise pass, in the dtype that the products want, and the values at the ids, complete and in
float32 until then, replace what stands there: nothing is added up in a narrow dtype.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp

from distill_jax.losses import sparse

_ROWS, _COLUMNS = 8, 128  # of a float32 tile on a TPU


def result_and_gradient(
    loss: Callable[[Any], tuple[jax.Array, Any]],
    logits_NV: jax.Array,
    where_N: jax.Array,
    dtype: Any,
    *,
    local: bool,
) -> tuple[Any, jax.Array]:
    """What `loss` returns beside its value, and the value's gradient by the logits in `dtype`.

    Args:
      loss: maps logits, or a `sparse.Lookups` in their place, to (scalar, anything). It is called
        several times.
      logits_NV: float32 [N, V].
      where_N: a token of weight 0 has no gradient, even where it is NaN.
      dtype: of the gradient, which is float32 until it is rounded once.
      local: whether all of the logits are known to lie on one device.
    """

    def masked(values):  # 0 * NaN would pass where a weight of 0 alone was to stop it
        nothing = (where_N == 0).reshape(-1, *[1] * (values.ndim - 1))
        return jnp.where(nothing, 0.0, values)

    clean_NV = masked(logits_NV)
    lookups = _record(loss, clean_NV)
    if _few(lookups, logits_NV.shape[1]):
        seen = _look_up(clean_NV, lookups, local)

        def of_answers(answers):
            return loss(_replay(clean_NV, lookups, jax.tree.map(masked, answers)))

        try:
            bars, result = jax.grad(of_answers, has_aux=True)(seen.answers)
        except _Changed:
            pass
        else:
            return result, _spread(seen, bars, dtype, local)
    gradient_NV, result = jax.grad(lambda logits: loss(masked(logits)), has_aux=True)(logits_NV)
    return result, gradient_NV.astype(dtype)


class _Changed(Exception):
    """An objective does not look the same up when it is called again."""


def _record(loss: Callable[[Any], Any], logits_NV: jax.Array) -> list[sparse.Lookup]:
    """What an objective looks up; nothing if that is not all that it does with logits."""
    made: list[sparse.Lookup] = []
    trace = jax.extend.core.get_opaque_trace_state()

    def answer(lookup: sparse.Lookup) -> tuple[jax.Array, jax.Array]:
        if jax.extend.core.get_opaque_trace_state() != trace:
            raise TypeError("ids within jit, scan, cond, ... are unknown outside of it")
        made.append(lookup)
        # What an objective asks next may depend on it; the compiler drops what does not.
        softened_NV = sparse.soften(logits_NV, lookup.temperature)
        return sparse.pick(softened_NV, lookup.ids, lookup.exclude)

    try:
        loss(sparse.Lookups(logits_NV.shape, sparse.largest(logits_NV), answer))
    except Exception:  # what an objective cannot do with a stand-in, it can with logits
        return []
    return made


def _replay(
    logits_NV: jax.Array, lookups: Sequence[sparse.Lookup], answers: Sequence[Any]
) -> sparse.Lookups:
    """A stand-in that gives `answers` to `lookups`, in this order."""
    expected = iter(zip(lookups, answers, strict=True))

    def answer(lookup: sparse.Lookup) -> tuple[jax.Array, jax.Array]:
        for was, its_answer in expected:
            if was.ids.shape == lookup.ids.shape and was[1:] == lookup[1:]:
                return its_answer
            break
        raise _Changed

    return sparse.Lookups(logits_NV.shape, sparse.largest(logits_NV), answer)


def _few(lookups: Sequence[sparse.Lookup], vocabulary: int) -> bool:
    """Whether comparing all ids with each other costs less than a pass over the vocabulary."""
    return 0 < sum(lookup.ids.shape[-1] for lookup in lookups) ** 2 <= vocabulary


class _Sum(NamedTuple):
    """The sum of exp(logits / T - shift) that a lookup takes the logarithm of.

    Attributes:
      temperature: T.
      counts_NU: which of all ids it counts.
      shift: [N].
      total: [N]; 1 where there is nothing to sum.
    """

    temperature: float
    counts_NU: jax.Array
    shift: jax.Array
    total: jax.Array


class _Seen(NamedTuple):
    """What all lookups together see of logits.

    Attributes:
      rest_NV: logits less the largest one; -inf at all ids if some lookup excludes ids.
      ids_NU: the ids of all lookups.
      logits_NU: the logits there, less the largest one.
      sums: of every lookup.
      answers: picked [N, K] and log_sum [N] of every lookup.
    """

    rest_NV: jax.Array
    ids_NU: jax.Array
    logits_NU: jax.Array
    sums: list[_Sum]
    answers: list[tuple[jax.Array, jax.Array]]


def _look_up(logits_NV: jax.Array, lookups: Sequence[sparse.Lookup], local: bool) -> _Seen:
    """Answers all lookups with one gather, and one scatter if any of them excludes ids.

    The logits outside all ids are summed once for a temperature; a lookup that excludes other ids
    than another one adds the few that it counts.
    """
    ids_NU = jnp.concatenate([lookup.ids for lookup in lookups], axis=-1)
    logits_NU = sparse.take(logits_NV, ids_NU)
    # Taken before -inf is written: otherwise the compiler copies the logits to write it.
    logits_NU, rest_NV = jax.lax.optimization_barrier((logits_NU, logits_NV))
    some_excluded = any(lookup.exclude for lookup in lookups)
    if some_excluded:
        rest_NV = _set(rest_NV, ids_NU, jnp.full_like(logits_NU, -jnp.inf), local)
    largest_N1 = sparse.largest(logits_NV)[:, None]
    rest_NV, logits_NU = rest_NV - largest_N1, logits_NU - largest_N1
    valid_NU = ids_NU < logits_NV.shape[1]
    first_NU = valid_NU & ~jnp.any(jnp.tril(_equal(ids_NU, ids_NU), -1), axis=-1)

    def sum_up(lookup: sparse.Lookup) -> tuple[_Sum, jax.Array]:
        parts = [rest_NV / lookup.temperature]
        counts_NU, shift = jnp.ones_like(valid_NU), jnp.zeros_like(largest_N1[:, 0])
        if lookup.exclude:
            counts_NU = ~jnp.any(_equal(ids_NU, lookup.ids), axis=-1)
        if some_excluded:
            beside_NU = jnp.where(first_NU & counts_NU, logits_NU / lookup.temperature, -jnp.inf)
            parts.append(beside_NU)
            # Relative to the largest of what is summed, which may be far below 0.
            shift = functools.reduce(jnp.maximum, (jnp.max(part, axis=-1) for part in parts))
            shift = jnp.where(jnp.isneginf(shift), 0.0, shift)
        sums = (jnp.sum(jnp.exp(part - shift[:, None]), axis=-1) for part in parts)
        total = functools.reduce(jnp.add, sums)
        log_sum = jnp.log(total) + shift
        total = jnp.where(total == 0, 1.0, total)  # nothing is there to sum
        return _Sum(lookup.temperature, counts_NU, shift, total), log_sum

    sums, answers, start = [], [], 0
    for lookup in lookups:
        stop = start + lookup.ids.shape[-1]
        one, log_sum = sum_up(lookup)
        sums.append(one)
        answers.append((logits_NU[:, start:stop] / lookup.temperature, log_sum))
        start = stop
    return _Seen(rest_NV, ids_NU, logits_NU, sums, answers)


def _spread(seen: _Seen, bars: Sequence[Any], dtype: Any, local: bool) -> jax.Array:
    """The gradient [N, V] from the derivatives by each lookup's answer."""
    everywhere, at_ids, picked_bars = [], [], []
    for one, (picked_bar, log_sum_bar) in zip(seen.sums, bars, strict=True):
        # As `exps / total`: the rounded logarithm would lose what is far below the largest logit.
        scale_N1 = (log_sum_bar / one.total / one.temperature)[:, None]

        def softmax(logits, one=one, scale_N1=scale_N1):
            return scale_N1 * jnp.exp(logits / one.temperature - one.shift[:, None])

        everywhere.append(softmax(seen.rest_NV))
        at_ids.append(jnp.where(one.counts_NU, softmax(seen.logits_NU), 0.0))
        picked_bars.append(picked_bar / one.temperature)
    bars_N1U = jnp.concatenate(picked_bars, axis=-1)[:, None, :]
    # An id may stand in several lookups, and more than once in one of them.
    at_ids.append(jnp.sum(jnp.where(_equal(seen.ids_NU, seen.ids_NU), bars_N1U, 0.0), axis=-1))
    total_NV, total_NU = (functools.reduce(jnp.add, parts) for parts in (everywhere, at_ids))
    return _set(total_NV.astype(dtype), seen.ids_NU, total_NU.astype(dtype), local)


def _equal(ids_NU: jax.Array, others_NK: jax.Array) -> jax.Array:
    """[N, U, K]."""
    return ids_NU[:, :, None] == others_NK[:, None, :]


def _set(values_NV: jax.Array, ids_NU: jax.Array, updates_NU: jax.Array, local: bool) -> jax.Array:
    """`values.at[ids].set` along the vocabulary; equal ids have equal updates."""
    tokens, vocabulary = values_NV.shape
    arrays = values_NV, ids_NU, updates_NU
    tiled = tokens % _ROWS == 0 and vocabulary % _COLUMNS == 0 and tokens * vocabulary < 2**31
    if not (local and tiled):
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
