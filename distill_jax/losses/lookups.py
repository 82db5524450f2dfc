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

    lookups = _record(loss, logits_NV)
    if _few(lookups, logits_NV.shape[1]):
        seen = _look_up(logits_NV, lookups, local)

        def of_answers(answers):
            return loss(_replay(seen, lookups, jax.tree.map(masked, answers)))

        try:
            bars, result = jax.grad(of_answers, has_aux=True)(seen.answers)
        except _Changed:
            pass
        else:
            everywhere_NV, at_ids_NU = _spread(seen, lookups, bars)
            gradient_NV = masked(everywhere_NV).astype(dtype)
            updates_NU = masked(at_ids_NU).astype(dtype)
            return result, _set(gradient_NV, seen.ids_NU, updates_NU, local)
    gradient_NV, result = jax.grad(loss, has_aux=True)(logits_NV)
    return result, masked(gradient_NV).astype(dtype)


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
    seen: "_Seen", lookups: Sequence[sparse.Lookup], answers: Sequence[Any]
) -> sparse.Lookups:
    """A stand-in that gives `answers` to `lookups`, in this order."""
    expected = iter(zip(lookups, answers, strict=True))

    def answer(lookup: sparse.Lookup) -> tuple[jax.Array, jax.Array]:
        for was, its_answer in expected:
            if was.ids.shape == lookup.ids.shape and was[1:] == lookup[1:]:
                return its_answer
            break
        raise _Changed

    return sparse.Lookups(seen.rest_NV.shape, seen.largest, answer)


def _few(lookups: Sequence[sparse.Lookup], vocabulary: int) -> bool:
    """Whether comparing all ids with each other costs less than a pass over the vocabulary."""
    return 0 < sum(lookup.ids.shape[-1] for lookup in lookups) ** 2 <= vocabulary


class _Sum(NamedTuple):
    """The sum of exp((logits - largest) / T - shift) that a lookup takes the logarithm of.

    Attributes:
      counts_NU: which of all ids it counts.
      shift: [N], so that the largest of what is summed is 1.
      total: [N]; 1 where there is nothing to sum.
    """

    counts_NU: jax.Array
    shift: jax.Array
    total: jax.Array


class _Seen(NamedTuple):
    """What all lookups together see of logits.

    Attributes:
      largest: [N], the largest logit.
      rest_NV: the logits less the largest one; -inf at all ids if some lookup excludes ids.
      top: [N], the largest of those.
      ids_NU: the ids of all lookups.
      logits_NU: the logits there, less the largest one.
      sums: of every lookup.
      answers: picked [N, K] and log_sum [N] of every lookup.
    """

    largest: jax.Array
    rest_NV: jax.Array
    top: jax.Array
    ids_NU: jax.Array
    logits_NU: jax.Array
    sums: list[_Sum]
    answers: list[tuple[jax.Array, jax.Array]]

    def exps(self, temperature: float) -> jax.Array:
        """exp((rest - top) / T), [N, V]."""
        top = jnp.where(jnp.isneginf(self.top), 0.0, self.top)
        return jnp.exp((self.rest_NV - top[:, None]) / temperature)


def _look_up(logits_NV: jax.Array, lookups: Sequence[sparse.Lookup], local: bool) -> _Seen:
    """Answers all lookups with one gather, and one scatter if any of them excludes ids.

    The logits outside all ids are summed once for a temperature; a lookup that excludes other ids
    than another one adds the few that it counts.
    """
    ids_NU = jnp.concatenate([lookup.ids for lookup in lookups], axis=-1)
    largest = sparse.largest(logits_NV)
    logits_NU = sparse.take(logits_NV, ids_NU)
    # Taken before -inf is written: otherwise the compiler copies the logits to write it.
    logits_NU, rest_NV = jax.lax.optimization_barrier((logits_NU, logits_NV))
    some_excluded = any(lookup.exclude for lookup in lookups)
    if some_excluded:
        rest_NV = _set(rest_NV, ids_NU, jnp.full_like(logits_NU, -jnp.inf), local)
    rest_NV, logits_NU = rest_NV - largest[:, None], logits_NU - largest[:, None]
    top = jnp.max(rest_NV, axis=-1) if some_excluded else jnp.zeros_like(largest)
    seen = _Seen(largest, rest_NV, top, ids_NU, logits_NU, [], [])
    valid_NU = ids_NU < logits_NV.shape[1]
    first_NU = valid_NU & ~jnp.any(jnp.tril(_equal(ids_NU, ids_NU), -1), axis=-1)
    rest = {t: jnp.sum(seen.exps(t), axis=-1) for t in {one.temperature for one in lookups}}

    def sum_up(lookup: sparse.Lookup, softened_NU: jax.Array) -> tuple[_Sum, jax.Array]:
        if not some_excluded:
            total = rest[lookup.temperature]
            everything = _Sum(jnp.ones_like(valid_NU), jnp.zeros_like(total), total)
            return everything, jnp.log(total)
        counts_NU = jnp.ones_like(valid_NU)
        if lookup.exclude:
            counts_NU = ~jnp.any(_equal(ids_NU, lookup.ids), axis=-1)
        beside_NU = jnp.where(first_NU & counts_NU, softened_NU, -jnp.inf)
        height = top / lookup.temperature
        # Relative to the largest of what is summed, which may be far below 0.
        shift = jnp.maximum(height, jnp.max(beside_NU, axis=-1))
        shift = jnp.where(jnp.isneginf(shift), 0.0, shift)
        total = rest[lookup.temperature] * jnp.exp(height - shift)
        total = total + jnp.sum(jnp.exp(beside_NU - shift[:, None]), axis=-1)
        nothing = total == 0
        return _Sum(counts_NU, shift, jnp.where(nothing, 1.0, total)), jnp.log(total) + shift

    start = 0
    for lookup in lookups:
        stop = start + lookup.ids.shape[-1]
        softened_NU = seen.logits_NU / lookup.temperature
        one, log_sum = sum_up(lookup, softened_NU)
        seen.sums.append(one)
        seen.answers.append((softened_NU[:, start:stop], log_sum))
        start = stop
    return seen


def _spread(
    seen: _Seen, lookups: Sequence[sparse.Lookup], bars: Sequence[Any]
) -> tuple[jax.Array, jax.Array]:
    """The gradient [N, V] outside all ids, and [N, U] at them, from those by the answers."""
    scales: dict[float, jax.Array] = {}
    at_ids, picked_bars = [], []
    for lookup, one, (picked_bar, log_sum_bar) in zip(lookups, seen.sums, bars, strict=True):
        temperature = lookup.temperature
        # As `exps / total`: the rounded logarithm would lose what is far below the largest logit.
        scale = log_sum_bar / one.total / temperature
        softmax_NU = jnp.exp(seen.logits_NU / temperature - one.shift[:, None])
        at_ids.append(jnp.where(one.counts_NU, scale[:, None] * softmax_NU, 0.0))
        picked_bars.append(picked_bar / temperature)
        raised = scale * jnp.exp(seen.top / temperature - one.shift)
        scales[temperature] = scales.get(temperature, 0.0) + raised
    bars_N1U = jnp.concatenate(picked_bars, axis=-1)[:, None, :]
    # An id may stand in several lookups, and more than once in one of them.
    at_ids.append(jnp.sum(jnp.where(_equal(seen.ids_NU, seen.ids_NU), bars_N1U, 0.0), axis=-1))
    everywhere = [scale[:, None] * seen.exps(t) for t, scale in scales.items()]
    return functools.reduce(jnp.add, everywhere), functools.reduce(jnp.add, at_ids)


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
