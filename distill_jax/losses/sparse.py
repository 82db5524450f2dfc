"""Logits at a few ids beside a log-sum-exp over the vocabulary: the core of every sparse loss."""

import copy
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

Logits = Any
"""An array [..., V], or `Lookups` in its place."""


def largest(logits: Logits) -> jax.Array:
    """The largest logit [...] in float32, without gradient."""
    if isinstance(logits, Lookups):
        return logits.largest
    return jax.lax.stop_gradient(jnp.asarray(jnp.max(logits, axis=-1), jnp.float32))


def soften(logits: Logits, temperature: float | jax.Array = 1.0) -> Logits:
    """(logits - max) / T in float32: in this order logits of 1e4 keep the digits that matter."""
    if isinstance(logits, Lookups):
        return logits.at_temperature(temperature)
    return (jnp.asarray(logits, jnp.float32) - largest(logits)[..., None]) / temperature


def pick(logits: Logits, ids: jax.Array, exclude: bool = False) -> tuple[jax.Array, jax.Array]:
    """Takes the logits at some ids, and the log-sum-exp of all logits or of the other ones.

    Summing the others separately, rather than subtracting from the whole, keeps a tail of 1e-9
    exact in float32. The gradient is written out because it is then one pass over the vocabulary
    and one scatter of K values; that of `take_along_axis` makes a zero array, scatters and adds.

    Args:
      logits: float32 [..., V], whose largest is 0, as `soften` gives them: nothing overflows then,
        and a difference of the results has the digits that one of two numbers near 1e4 lacks.
      ids: int [..., K]. An id outside [0, V) gives NaN and receives no gradient.
      exclude: whether the log-sum-exp leaves `ids` out (they must be distinct then).

    Returns:
      picked [..., K], log_sum [...].
    """
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"ids and labels must be integers, got {ids.dtype}")
    ids = jnp.asarray(ids, jnp.int32)  # narrower ones could not hold the size of the vocabulary
    ids = jnp.where(ids < 0, logits.shape[-1], ids)  # negative ids would count from the end
    if isinstance(logits, Lookups):
        return logits.pick(ids, exclude)
    return _pick(logits, ids, exclude)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _pick(logits, ids, exclude):
    return _pick_forward(logits, ids, exclude)[0]


def _pick_forward(logits: jax.Array, ids: jax.Array, exclude: bool):
    picked = take(logits, ids)
    others = at(logits, ids, "set", jnp.full_like(picked, -jnp.inf)) if exclude else logits
    log_sum, exps, total = log_sum_exp(others, largest=None if exclude else 0.0)
    return (picked, log_sum), (exps, total, ids)


def _pick_backward(exclude: bool, residuals, cotangents):
    del exclude
    exps, total, ids = residuals
    picked_bar, log_sum_bar = cotangents
    return at(exps * (log_sum_bar / total)[..., None], ids, "add", picked_bar), None


_pick.defvjp(_pick_forward, _pick_backward)


def at(values: jax.Array, ids: jax.Array, method: str, updates: jax.Array) -> jax.Array:
    """`values.at[ids].set` or `.add` along the last axis; ids beyond it are dropped.

    A single id, a label, is compared with all: that fuses with whatever makes `values`, where a
    scatter needs an array of its own. For more, leading axes are mapped, not indexed, so that a
    sharded batch axis stays where it is.
    """
    if ids.shape[-1] == 1:
        here = jnp.arange(values.shape[-1]) == ids
        return jnp.where(here, updates if method == "set" else values + updates, values)

    def update(row, ids, updates):
        return getattr(row.at[ids], method)(updates, mode="drop")

    for _ in range(values.ndim - 1):
        update = jax.vmap(update)
    return update(values, ids, updates)


def take(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """The logits [..., K] at ids that are not below 0; NaN at those beyond the vocabulary."""
    return jnp.take_along_axis(logits, ids, axis=-1, mode="fill", fill_value=jnp.nan)


def log_sum_exp(
    logits: jax.Array, largest: float | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """log sum exp [...], with the shifted exps [..., V] and their sum [...] it was made of.

    Args:
      logits: [..., V]; all may be -inf.
      largest: the largest of each token's logits, if it is known; their own is found otherwise,
        which may be far below 0.
    """
    shift = jnp.max(logits, axis=-1) if largest is None else jnp.full(logits.shape[:-1], largest)
    empty = jnp.isneginf(shift)  # nothing is there to sum
    exps = jnp.exp(logits - jnp.where(empty, 0.0, shift)[..., None])
    total = jnp.sum(exps, axis=-1)
    return jnp.log(total) + shift, exps, jnp.where(empty, 1.0, total)


@dataclasses.dataclass(frozen=True)
class Lookup:
    """One call of `pick`.

    Attributes:
      ids: int32 [N, K]; those outside the vocabulary are not below 0.
      temperature: what the logits were divided by.
      exclude: whether the log-sum-exp leaves `ids` out.
    """

    ids: jax.Array
    temperature: float | jax.Array
    exclude: bool


class Lookups:
    """Stands for logits [N, V] in an objective that reads them through `pick`, and keeps its calls.

    It is no array: whatever else an objective wants of the logits raises. `answering` gives one
    that answers the same calls in the same order with what it is told, to be differentiated by.

    Attributes:
      logits: float32 [N, V].
      largest: float32 [N].
      made: every lookup, in order.
      shape: [N, V].
      ndim: 2.
    """

    def __init__(self, logits: jax.Array):
        self.logits, self.largest = logits, largest(logits)
        self.shape, self.ndim = logits.shape, logits.ndim
        self.made: list[Lookup] = []
        self._temperature: float | jax.Array = 1.0
        self._answers: Iterator[tuple[jax.Array, jax.Array]] | None = None

    def answering(self, answers: Iterable[tuple[jax.Array, jax.Array]]) -> "Lookups":
        """The same logits, whose lookups give `answers`."""
        other = copy.copy(self)
        other._answers = iter(answers)
        return other

    def at_temperature(self, temperature: float | jax.Array) -> "Lookups":
        """The same logits, divided by a temperature."""
        other = copy.copy(self)
        other._temperature = self._temperature * temperature
        return other

    def pick(self, ids: jax.Array, exclude: bool) -> tuple[jax.Array, jax.Array]:
        """As `sparse.pick`."""
        if self._answers is not None:
            return next(self._answers)
        self.made.append(Lookup(ids, self._temperature, exclude))
        # What an objective asks next may depend on it; the compiler drops what does not.
        return _pick(soften(self.logits, self._temperature), ids, exclude)
