"""Positive definite systems that are too large for one device, or for the compiler.

XLA makes a Cholesky factor of a matrix that is whole on every device, and for TPUs a program as
long as the matrix: minutes to compile at 8192 rows. Here is one loop over blocks, made of matrix
products that are split over a mesh.

Dimensions: I rows of the system, O right-hand sides.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.linalg import cho_factor, cho_solve
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_BLOCK = 128

exact_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
"""A matrix product in full float32, which TPUs do not take by themselves."""


def solve_positive(matrix_II: Array, wanted_IO: Array, mesh: Mesh | None = None) -> Array:
    """X [I, O] with matrix X = wanted, by Gaussian elimination of blocks.

    Without pivoting, which a positive definite matrix does not need: the blocks on its way are
    positive definite too, and are factored by Cholesky (Golub & Van Loan 2013, 4.2). NaN where the
    matrix is not positive definite in float32.

    Args:
      matrix_II: symmetric, float32.
      wanted_IO: float32.
      mesh: over all of which columns are split; None leaves that to JAX.
    """
    size = len(matrix_II)
    count = -(-size // _BLOCK)
    extra = count * _BLOCK - size
    # The rows that fill the last block up are those of an identity.
    filling = jnp.diag((jnp.arange(size + extra) >= size).astype(matrix_II.dtype))
    start = _split(jnp.pad(matrix_II, ((0, extra), (0, extra))) + filling, mesh)
    index = jnp.arange(size + extra)

    def rows(array: Array, block: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(array, block * _BLOCK, _BLOCK, axis=0)

    def panel(left: Array, block: Array) -> tuple[tuple[Array, bool], Array]:
        """The factor of a block's pivot, and the block's rows right of it; whole on all devices."""
        found = _split(rows(left, block), mesh, PartitionSpec())
        pivot = jax.lax.dynamic_slice_in_dim(found, block * _BLOCK, _BLOCK, axis=1)
        return cho_factor(pivot), jnp.where(index >= (block + 1) * _BLOCK, found, 0)

    def eliminate(block: Array, system: tuple[Array, Array]) -> tuple[Array, Array]:
        pivot, right_of_it = panel(system[0], block)
        factors = cho_solve(pivot, right_of_it).T
        left, right = (_split(x - exact_dot(factors, rows(x, block)), mesh) for x in system)
        return left, right

    def substitute(step: Array, right: Array) -> Array:
        block = count - 1 - step
        pivot, right_of_it = panel(left, block)
        found = cho_solve(pivot, rows(right, block) - exact_dot(right_of_it, right))
        right = jax.lax.dynamic_update_slice_in_dim(right, found, block * _BLOCK, axis=0)
        return _split(right, mesh)

    wanted = _split(jnp.pad(wanted_IO, ((0, extra), (0, 0))), mesh)
    left, right = jax.lax.fori_loop(0, count, eliminate, (start, wanted))
    return jax.lax.fori_loop(0, count, substitute, right)[:size]


def _split(array: Array, mesh: Mesh | None, spec: PartitionSpec | None = None) -> Array:
    """By columns over all of the mesh, or as the specification says."""
    if mesh is None:
        return array
    place = NamedSharding(mesh, PartitionSpec(None, mesh.axis_names) if spec is None else spec)
    return jax.lax.with_sharding_constraint(array, place)
