import jax
import numpy as np
import pytest

from distill_jax import parallel
from distill_jax.pruning.elimination import solve_positive


@pytest.mark.parametrize("size", [5, 128, 300])
def test_positive_definite_systems_are_solved(size):
    """Against LAPACK in float64, for one device and for eight."""
    random = np.random.default_rng(size)
    X = random.normal(size=(2 * size, size)) * np.geomspace(0.1, 1, size)
    matrix = X.T @ X / len(X) + 1e-3 * np.eye(size)
    wanted = random.normal(size=(size, 7))
    want = np.linalg.solve(matrix, wanted)
    mesh = parallel.make_mesh(parallel.MeshConfig(fsdp=4, tensor=2))
    for place in (None, mesh):
        solve = jax.jit(lambda a, b, place=place: solve_positive(a, b, place))
        got = solve(matrix.astype(np.float32), wanted.astype(np.float32))
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_what_is_not_positive_definite_has_no_solution():
    got = solve_positive(np.diag([1.0, -1.0]).astype(np.float32), np.ones((2, 1), np.float32))
    assert np.isnan(got).any()
