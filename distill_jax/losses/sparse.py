"""Logits at a few ids beside a log-sum-exp over the vocabulary: the core of every sparse loss."""

import functools

import jax
import jax.numpy as jnp


def soften(logits: jax.Array, temperature: float | jax.Array = 1.0) -> jax.Array:
    """(logits - max) / T in float32: in this order logits of 1e4 keep the digits that matter."""
    logits = jnp.asarray(logits, jnp.float32)
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    return (logits - largest) / temperature


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def pick(logits: jax.Array, ids: jax.Array, exclude: bool = False) -> tuple[jax.Array, jax.Array]:
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
    return _pick_forward(logits, ids, exclude)[0]


def _pick_forward(logits: jax.Array, ids: jax.Array, exclude: bool):
    vocabulary = logits.shape[-1]
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"ids and labels must be integers, got {ids.dtype}")
    ids = jnp.asarray(ids, jnp.int32)  # narrower ones could not hold the size of the vocabulary
    ids = jnp.where(ids < 0, vocabulary, ids)  # negative ids would count from the end
    picked = jnp.take_along_axis(logits, ids, axis=-1, mode="fill", fill_value=jnp.nan)
    if not exclude:
        exps = jnp.exp(logits)
        total = jnp.sum(exps, axis=-1)
        return (picked, jnp.log(total)), (exps, total, ids)
    others = _at(logits, ids, "set", jnp.full_like(picked, -jnp.inf))
    # Relative to their own largest, which may be far below 0.
    largest = jnp.max(others, axis=-1)
    empty = jnp.isneginf(largest)  # nothing is left to sum
    exps = jnp.exp(others - jnp.where(empty, 0.0, largest)[..., None])
    total = jnp.sum(exps, axis=-1)
    return (picked, jnp.log(total) + largest), (exps, jnp.where(empty, 1.0, total), ids)


def _pick_backward(exclude: bool, residuals, cotangents):
    del exclude
    exps, total, ids = residuals
    picked_bar, log_sum_bar = cotangents
    return _at(exps * (log_sum_bar / total)[..., None], ids, "add", picked_bar), None


pick.defvjp(_pick_forward, _pick_backward)


def _at(values: jax.Array, ids: jax.Array, method: str, updates: jax.Array) -> jax.Array:
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
