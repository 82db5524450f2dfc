import dataclasses

import jax
import numpy as np
import numpy_llama
import pytest
import tiny

from distill_jax import models
from distill_jax.pruning import make_plan
from distill_jax.pruning.masking import Masks, mask

CUTS = {
    "nothing": {},
    "layers": {"layers": 2},
    "embed": {"embed": 7},
    "mlp": {"mlp": 9},
    "heads": {"kv_heads": 2, "heads": 2},
    "head_dim": {"head_dim": 4},
    "tied": {"embed": 7, "tied": True},
    "everything": tiny.EVERYTHING,
}


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", CUTS)
def test_masked_parameters_compute_what_the_masked_model_does(name, tied):
    # So large an eps that forgetting it would show.
    source = dataclasses.replace(tiny.SOURCE, tied=tied, norm_eps=0.1)
    target = dataclasses.replace(source, **CUTS[name])
    plan = make_plan(tiny.random_scores(source), source, target)
    model, batch = tiny.model(source), tiny.rows(3)
    tokens, segments = batch["tokens"], batch["segment_ids"]
    masked = mask(model.params, Masks.of_plan(plan), tied=target.tied)
    assert jax.tree.map(np.shape, masked) == jax.tree.map(np.shape, model.params)
    got = models.logits(source, masked, tokens, segments)
    masks = numpy_llama.Masks.of_plan(plan)
    want = numpy_llama.logits(source, model.params, tokens, segments, masks, tied=target.tied)
    np.testing.assert_allclose(got[segments > 0], want[segments > 0], atol=2e-5)
