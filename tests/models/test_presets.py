import math

import jax
import pytest

from distill_jax import models


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (models.LLAMA_3_1_70B, 70.554e9),
        (models.LLAMA_3_1_8B, 8.030e9),
        (models.LLAMA_3_2_3B, 3.213e9),
        (models.LLAMA_3_2_1B, 1.236e9),
        (models.SMOLLM2_135M, 134.515e6),
    ],
)
def test_presets_have_the_published_number_of_parameters(config, published):
    leaves = jax.tree.leaves(models.abstract_params(config))
    counted = sum(math.prod(leaf.shape) for leaf in leaves)
    assert counted == config.parameters
    assert counted == pytest.approx(published, rel=5e-4)
