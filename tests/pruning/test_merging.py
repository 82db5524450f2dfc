import dataclasses

import jax
import numpy as np
import numpy_llama
import pytest
import tiny

from distill_jax import models
from distill_jax.pruning import apply_plan, make_plan, merge_kv_heads


def merged_by_hand(plan, params):
    """Key and value weights of each group replaced by their mean, in the kept layers, by loops."""
    params = jax.tree.map(lambda x: np.array(x, np.float64), params)
    attention = params["layers"]["attention"]
    for new, layer in enumerate(plan.layers):
        for group in plan.merged_kv_heads[new]:
            for name in ("key", "value"):
                mean = sum(attention[name][layer, :, k] for k in group) / len(group)
                for k in group:
                    attention[name][layer, :, k] = mean
    return params


@pytest.mark.slow
@pytest.mark.parametrize(
    "cut",
    [
        {"kv_heads": 2},
        {"kv_heads": 1, "heads": 5},
        {"kv_heads": 2, "heads": 6, "layers": 3, "embed": 7, "mlp": 9, "head_dim": 4},
    ],
    ids=str,
)
def test_pruned_equals_masked_with_means(cut):
    target = dataclasses.replace(tiny.SOURCE, **cut)
    plan = make_plan(tiny.random_scores(tiny.SOURCE), tiny.SOURCE, target, kv_choice="merge")
    model, batch = tiny.model(), tiny.rows(3)
    tokens, segments = batch["tokens"], batch["segment_ids"]
    student = jax.jit(lambda params: apply_plan(plan, merge_kv_heads(plan, params)))(model.params)
    got = models.logits(target, student, tokens, segments)
    masks = numpy_llama.Masks.of_plan(plan)
    want = numpy_llama.logits(
        tiny.SOURCE, merged_by_hand(plan, model.params), tokens, segments, masks, tied=False
    )
    np.testing.assert_allclose(got[segments > 0], want[segments > 0], atol=1e-5)


def test_equal_heads_merge_without_loss():
    """A model whose neighbouring key/value heads are copies is the same with half of them."""
    model, batch = tiny.model(), tiny.rows(3)
    params = jax.tree.map(np.array, model.params)
    for name in ("key", "value"):
        weight = params["layers"]["attention"][name]
        weight[:, :, 1::2] = weight[:, :, ::2]
    target = dataclasses.replace(tiny.SOURCE, kv_heads=2)
    scores = tiny.random_scores(tiny.SOURCE)
    plan = make_plan(scores, tiny.SOURCE, target, kv_choice="merge")
    student = apply_plan(plan, merge_kv_heads(plan, params))
    tokens, segments = batch["tokens"], batch["segment_ids"]
    got = models.logits(target, student, tokens, segments)
    want = models.logits(tiny.SOURCE, params, tokens, segments)
    np.testing.assert_allclose(got[segments > 0], want[segments > 0], atol=1e-5)


def test_without_groups_nothing_changes():
    plan = make_plan(tiny.random_scores(tiny.SOURCE), tiny.SOURCE, tiny.SOURCE, kv_choice="merge")
    params = tiny.model().params
    assert plan.merged_kv_heads is None
    assert merge_kv_heads(plan, params) is params
