"""Random parameters that need no compilation, neither to be drawn nor to be spread over devices."""

import jax
import numpy as np

from distill_jax import models


def drawn_params(config, seed=0):
    """As `models.init_params` draws them, but NumPy's, so that no step can use them up."""
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        names = jax.tree_util.keystr(path)
        if "norm" in names:
            return np.ones(leaf.shape, leaf.dtype)
        ends = "output" in names or "down" in names
        scale = 0.02 / (2 * config.layers) ** 0.5 if ends else 0.02
        return random.normal(0.0, scale, leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, models.abstract_params(config))
