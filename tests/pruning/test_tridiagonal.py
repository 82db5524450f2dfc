import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import parallel
from distill_jax.pruning.tridiagonal import solve_shifted, tridiagonalise


def matrix(size, values):
    """Symmetric, with these eigenvalues."""
    turned, _ = np.linalg.qr(np.random.default_rng(size).normal(size=(size, size)))
    return (turned * values) @ turned.T


@pytest.mark.parametrize("size", [1, 2, 3, 40])
def test_a_matrix_becomes_tridiagonal(size):
    """With the eigenvalues that it has in float64, and a rotation that leads back to it."""
    full = matrix(size, np.geomspace(1e-2, 1, size))
    diagonal, beside, Q = map(np.asarray, jax.jit(tridiagonalise)(full.astype(np.float32)))
    assert beside[-1] == 0
    small = np.diag(diagonal) + np.diag(beside[:-1], 1) + np.diag(beside[:-1], -1)
    np.testing.assert_allclose(np.linalg.eigvalsh(small), np.linalg.eigvalsh(full), atol=3e-6)
    np.testing.assert_allclose(Q @ small @ Q.T, full, atol=3e-6)
    np.testing.assert_allclose(Q.T @ Q, np.eye(size), atol=3e-6)


def test_each_system_has_a_shift_of_its_own():
    """Against LAPACK in float64, for one device and for eight; a third says nothing."""
    full = matrix(96, np.append(np.zeros(32), np.geomspace(1e-3, 10, 64)))
    random = np.random.default_rng(0)
    shift = np.geomspace(1e-2, 10, 24)
    wanted = random.normal(size=(24, 96))
    want = [np.linalg.solve(full + s * np.eye(96), b) for s, b in zip(shift, wanted, strict=True)]
    mesh = parallel.make_mesh(parallel.MeshConfig(fsdp=4, tensor=2))
    for place in (None, mesh):
        solve = jax.jit(lambda *args, place=place: solve_shifted(*args, place))
        got = solve(*(x.astype(np.float32) for x in (full, shift, wanted)))
        np.testing.assert_allclose(got, want, atol=1e-3 * np.abs(want).max())


def test_what_rounding_makes_negative_counts_as_nothing():
    """Less than the shift no eigenvalue is, so that a solution is at most wanted / shift."""
    full = np.diag([1.0, -1e-3, 0.0]).astype(np.float32)
    got = solve_shifted(full, np.float32([1e-3]), np.ones((1, 3), np.float32))
    np.testing.assert_allclose(got, [[1 / 1.001, 1e3, 1e3]], rtol=1e-5)


def test_a_matrix_of_half_rank_with_the_least_shift_is_solved_as_eigenvalues_solve_it():
    random = np.random.default_rng(5)
    factor = random.normal(size=(200, 100))
    matrix = (factor @ factor.T).astype(np.float32)
    least = 64 * np.finfo(np.float32).eps * np.linalg.norm(matrix)
    shift = np.geomspace(least, 1e3 * least, 8).astype(np.float32)
    wanted = random.normal(size=(8, 200)).astype(np.float32)
    exact = np.stack(
        [
            np.linalg.solve(matrix.astype(np.float64) + s * np.eye(200), w)
            for s, w in zip(shift.astype(np.float64), wanted, strict=True)
        ]
    )
    found = np.asarray(solve_shifted(jnp.asarray(matrix), jnp.asarray(shift), jnp.asarray(wanted)))
    values, Q = np.linalg.eigh(matrix)
    theirs = (wanted @ Q / (np.maximum(values, 0) + shift[:, None])) @ Q.T

    def error(x):
        return np.linalg.norm(x - exact, axis=1) / np.linalg.norm(exact, axis=1)

    assert np.isfinite(found).all()
    assert (error(found) < 10 * error(theirs) + 1e-3).all()
