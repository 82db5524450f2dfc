import dataclasses
import math

import jax
import numpy as np
import pytest

from distill_jax import models, parallel
from distill_jax.artifacts import InputError

CONFIG = models.LlamaConfig(
    vocab_size=32, embed=16, mlp=24, layers=2, heads=4, kv_heads=2, head_dim=6, tied=True
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Three models of one shape, and where they are."""
    place = tmp_path_factory.mktemp("models")
    found = []
    for seed in range(3):
        params = models.init_params(CONFIG, jax.random.key(seed))
        models.save(place / str(seed), models.Model(CONFIG, params))
        found.append(params)
    return found, [place / str(seed) for seed in range(3)]


def in_float64(params, weights):
    def mean(*leaves):
        return np.average(np.stack([np.asarray(x, np.float64) for x in leaves]), 0, weights)

    return jax.tree.map(mean, *params)


@pytest.mark.parametrize("weights", [None, (1, 2, 5), (0.5, 0.0, 1.5)])
def test_the_mean_of_parameters(saved, weights):
    params, paths = saved
    found = models.average(paths, weights=weights)
    assert found.config == CONFIG
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7),
        found.params,
        in_float64(params, weights),
    )


def test_it_lies_where_it_is_to_lie(saved):
    params, paths = saved
    mesh = parallel.make_mesh(parallel.MeshConfig(tensor=2))
    places = parallel.shardings(mesh, models.logical_axes(CONFIG), params[0])
    found = models.average(paths[:2], shardings=places)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7),
        found.params,
        in_float64(params[:2], None),
    )
    same = jax.tree.map(
        lambda a, place: a.sharding.is_equivalent_to(place, a.ndim), found.params, places
    )
    assert jax.tree.all(same)


@pytest.mark.parametrize(
    ("count", "weights", "message"),
    [
        (0, None, "no models"),
        (2, (1.0,), "2 models and 1 weights"),
        (2, (1.0, -1.0), "not numbers with a sum above 0"),
        (2, (1.0, math.nan), "not numbers"),
    ],
)
def test_what_has_no_mean_is_refused(saved, count, weights, message):
    with pytest.raises(InputError, match=message):
        models.average(saved[1][:count], weights=weights)


def test_models_of_different_shapes_are_refused(saved, tmp_path):
    other = dataclasses.replace(CONFIG, mlp=32)
    models.save(tmp_path, models.Model(other, models.init_params(other, jax.random.key(0))))
    with pytest.raises(InputError, match=r"another shape than .*2: mlp: 24 -> 32$"):
        models.average([saved[1][2], tmp_path])
