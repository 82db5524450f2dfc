"""Ridge least squares from sums over calibration tokens, the penalty chosen on other tokens.

Dimensions: B batch, T time, I inputs, O outputs.
"""

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from distill_jax.pruning.elimination import exact_dot, solve_positive
from distill_jax.pruning.repair import split_matrices

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""What the penalty is chosen from, as fractions of each input's power."""
_CHECKED = 4


class Sums(NamedTuple):
    """Of calibration tokens, float32: X^T X [I, I], and X^T Y [I, O] with Y what is lacking."""

    gram: Array
    cross: Array


def sums_of(inputs_BTI: Array, lacking_BTO: Array, weight_BT: Array, mesh: Mesh | None) -> Sums:
    """Of one batch, each token counted by its weight; split over the mesh."""
    root = jnp.sqrt(weight_BT)[..., None]
    x, y = inputs_BTI.astype(jnp.float32) * root, lacking_BTO.astype(jnp.float32) * root
    return split_matrices(
        Sums(jnp.einsum("BTI,BTJ->IJ", x, x), jnp.einsum("BTI,BTO->IO", x, y)), mesh
    )


def fit(parts: Iterable[Sums], ridge: float | None, mesh: Mesh | None = None) -> Array:
    """The change of a projection, (G + ridge diag G)^-1 X^T Y, float32 [I, O].

    Args:
      parts: the sums of each batch.
      ridge: the penalty, or None: of `RIDGES`, or no change at all, what errs least on every fourth
        batch, from the second on, when the others are fitted; then all are.
      mesh: over which the change is split.
    """
    fitted, checked = None, None
    for number, part in enumerate(parts):
        if ridge is None and number % _CHECKED == 1:
            checked = part if checked is None else _add(checked, part)
        else:
            fitted = part if fitted is None else _add(fitted, part)
    assert fitted is not None  # there are parts, and two to choose a ridge
    if ridge is not None:
        return solve(fitted, ridge, mesh)
    assert checked is not None
    return _choose(fitted, checked, mesh)


@functools.partial(jax.jit, donate_argnums=0)
def _add(total: Sums, new: Sums) -> Sums:
    return jax.tree.map(jnp.add, total, new)


@functools.partial(jax.jit, static_argnames="mesh")
def solve(sums: Sums, ridge: Array | float, mesh: Mesh | None) -> Array:
    """Inputs are scaled to unit power first: float32 suffices though some are far louder."""
    power = jnp.diagonal(sums.gram)
    size = jnp.sqrt(jnp.where(power > 0, power, 1.0))[:, None]
    correlation = sums.gram / size / size.T
    found = solve_positive(correlation + ridge * jnp.eye(len(size)), sums.cross / size, mesh)
    return split_matrices(found / size, mesh)


def _choose(fitted: Sums, checked: Sums, mesh: Mesh | None) -> Array:
    """`solve` of all tokens, by the ridge that serves the checked ones best, if any serves them."""
    errors = [float(_error(checked, solve(fitted, ridge, mesh))) for ridge in RIDGES]
    errors = [math.inf if math.isnan(error) else error for error in errors]
    if min(errors) >= 0:
        return jnp.zeros_like(fitted.cross)
    return solve(_add(fitted, checked), RIDGES[errors.index(min(errors))], mesh)


@jax.jit
def _error(checked: Sums, change_IO: Array) -> Array:
    """By how much a change adds to the summed squares on the checked tokens."""
    squares = jnp.sum(change_IO * exact_dot(checked.gram, change_IO))
    return squares - 2 * jnp.sum(change_IO * checked.cross)
