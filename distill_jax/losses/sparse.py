"""Logits at a few ids beside a log-sum-exp over the vocabulary: the core of every sparse loss."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

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
        return logits.soften(temperature)
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
    if not exclude:
        exps = jnp.exp(logits)
        total = jnp.sum(exps, axis=-1)
        return (picked, jnp.log(total)), (exps, total, ids)
    others = at(logits, ids, "set", jnp.full_like(picked, -jnp.inf))
    # Relative to their own largest, which may be far below 0.
    shift = jnp.max(others, axis=-1)
    empty = jnp.isneginf(shift)  # nothing is left to sum
    exps = jnp.exp(others - jnp.where(empty, 0.0, shift)[..., None])
    total = jnp.sum(exps, axis=-1)
    return (picked, jnp.log(total) + shift), (exps, jnp.where(empty, 1.0, total), ids)


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


class Lookup(NamedTuple):
    """One call of `pick`.

    Attributes:
      ids: int32 [N, K]; those outside the vocabulary are not below 0.
      temperature: what the logits were divided by.
      exclude: whether the log-sum-exp leaves `ids` out.
    """

    ids: jax.Array
    temperature: float
    exclude: bool


class Lookups:
    """Stands for logits [N, V] in an objective that softens them and looks ids up, no more.

    Whatever else an objective wants of the logits raises: a stand-in is no array.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        largest: jax.Array,
        answer: Callable[[Lookup], tuple[jax.Array, jax.Array]],
        temperature: float | None = None,
    ):
        """A stand-in.

        Args:
          shape: [N, V].
          largest: the largest logits, float32 [N].
          answer: what `pick` returns for a lookup.
          temperature: what the logits are divided by; None: they were not softened.
        """
        self.shape, self.ndim, self.largest = shape, len(shape), largest
        self._answer, self._temperature = answer, temperature

    # Python's own answers to these would go unnoticed.
    __bool__ = __eq__ = __hash__ = None  # type: ignore[assignment]

    def soften(self, temperature: float | jax.Array) -> "Lookups":
        """As `sparse.soften`."""
        if isinstance(temperature, jax.Array):
            raise TypeError("a temperature that is an array may depend on the logits")
        temperature = (self._temperature or 1.0) * temperature
        return Lookups(self.shape, self.largest, self._answer, temperature)

    def pick(self, ids: jax.Array, exclude: bool) -> tuple[jax.Array, jax.Array]:
        """As `sparse.pick`."""
        if self._temperature is None:
            raise TypeError("logits must be softened before ids are looked up")
        return self._answer(Lookup(ids, self._temperature, exclude))
