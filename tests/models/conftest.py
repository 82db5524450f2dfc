import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import models


@pytest.fixture(scope="session")
def random_model():
    """`random_model(config)`: NumPy's random numbers, which need no compilation."""

    def make(config):
        random = np.random.default_rng(0)

        def draw(path, leaf):
            centre = 1.0 if "norm" in jax.tree_util.keystr(path) else 0.0
            values = random.normal(centre, 0.2, leaf.shape)
            return jnp.asarray(values, leaf.dtype)

        return models.Model(
            config, jax.tree_util.tree_map_with_path(draw, models.abstract_params(config))
        )

    return make
