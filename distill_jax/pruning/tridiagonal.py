"""Systems of one matrix and many shifts, (S + s I) x = b, each with a shift of its own.

An eigendecomposition would make all of them diagonal, but for TPUs the compiler takes longer than
anybody waits over one of thousands of rows. A tridiagonal matrix serves as well, it takes one loop,
and eigenvalue solvers begin with it.

Dimensions: I rows of the matrix, N systems.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distill_jax.pruning.elimination import exact_dot


def solve_shifted(
    matrix_II: Array, shift_N: Array, wanted_NI: Array, mesh: Mesh | None = None
) -> Array:
    """X [N, I] with (matrix + shift_n identity) x_n = wanted_n.

    Args:
      matrix_II: symmetric, float32; of its eigenvalues none is negative but by rounding.
      shift_N: positive; where the matrix has not full rank, no less than some 64 times what float32
        resolves of its norm: below, what rounding leaves of the matrix grows from row to row.
      wanted_NI: float32.
      mesh: over all of which systems are split; None leaves that to JAX.
    """

    def split(array: Array, spec: PartitionSpec) -> Array:
        if mesh is None:
            return array
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec))

    names = None if mesh is None else mesh.axis_names
    diagonal_I, beside_I, Q_II = tridiagonalise(matrix_II)
    rotated_IN = split(exact_dot(Q_II.T, wanted_NI.T), PartitionSpec(None, names))
    before_I = jnp.roll(beside_I, 1).at[0].set(0)

    def eliminate(
        above: tuple[Array, Array], row: tuple[Array, Array, Array]
    ) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        pivot_N, right_N = above
        on, before, wanted_N = row
        factor_N = before / pivot_N
        # Without rounding no pivot is less than the shift: the rest of the matrix is not negative.
        pivot_N = jnp.maximum(shift_N + on - factor_N * before, shift_N)
        found = pivot_N, wanted_N - factor_N * right_N
        return found, found

    def substitute(below_N: Array, row: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        pivot_N, right_N, beside = row
        found_N = (right_N - beside * below_N) / pivot_N
        return found_N, found_N

    nothing_N = split(jnp.zeros_like(rotated_IN[0]), PartitionSpec(names))
    _, (pivot_IN, right_IN) = jax.lax.scan(
        eliminate, (nothing_N + 1, nothing_N), (diagonal_I, before_I, rotated_IN)
    )
    _, found_IN = jax.lax.scan(substitute, nothing_N, (pivot_IN, right_IN, beside_I), reverse=True)
    return split(exact_dot(found_IN.T, Q_II.T), PartitionSpec(names))


def tridiagonalise(matrix_II: Array) -> tuple[Array, Array, Array]:
    """The diagonal [I] and what stands beside it [I], the last 0, of Q^T matrix Q; and Q [I, I].

    Householder's reflections, column by column (Golub & Van Loan 2013, 8.3.1).

    Args:
      matrix_II: symmetric, float32.
    """
    size = len(matrix_II)
    index = jnp.arange(size)

    def reflect(column: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        matrix, Q = found
        # A row is the column, too, and lies in one piece.
        x = jnp.where(index > column, matrix[column], 0)
        head = x[column + 1]
        v = x.at[column + 1].add(jnp.where(head < 0, -1, 1) * jnp.linalg.norm(x))
        square = jnp.sum(jnp.square(v))
        factor = jnp.where(square > 0, 2 / square, 0)
        # Sums, not products of matrices: these read the matrix once, and are exact on TPUs.
        p = factor * jnp.sum(matrix * v, axis=1)
        w = p - factor / 2 * jnp.sum(p * v) * v
        change = v[:, None] * w
        turned = factor * jnp.sum(Q * v, axis=1)
        return matrix - (change + change.T), Q - turned[:, None] * v

    start = matrix_II, jnp.eye(size, dtype=matrix_II.dtype)
    matrix, Q_II = jax.lax.fori_loop(0, max(size - 2, 0), reflect, start)
    beside_I = jnp.append(jnp.diagonal(matrix, 1), jnp.zeros(1, matrix.dtype))
    return jnp.diagonal(matrix), beside_I, Q_II
