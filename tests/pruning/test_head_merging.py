import dataclasses

import jax
import numpy as np
import pytest
import tiny

from distill_jax.pruning import make_plan, merge_query_heads

SOURCE = dataclasses.replace(tiny.SOURCE, heads=8, kv_heads=2, layers=3)


@pytest.mark.parametrize(("kv_heads", "group"), [(2, 4), (2, 3), (2, 2), (1, 2), (2, 1)])
def test_each_head_that_stays_answers_for_one_that_goes(kv_heads, group):
    """The paper's formula head by head, counted from one: 8 heads in 2 groups of 4."""
    scores = tiny.random_scores(SOURCE)
    target = dataclasses.replace(SOURCE, layers=2, kv_heads=kv_heads, heads=kv_heads * group)
    plan = make_plan(scores, SOURCE, target)
    params = tiny.model(SOURCE).params
    old = np.asarray(params["layers"]["attention"]["query"])
    want = old.copy()
    for place, layer in enumerate(plan.layers):
        for kv_head in plan.kv_heads[place]:
            heads = sorted(
                range(4 * kv_head, 4 * kv_head + 4), key=lambda h: -scores.heads[layer, h]
            )
            ranked = dict(enumerate(heads, start=1))
            for i in range(1, group + 1):
                partner = 2 * group - i + 1
                if group < partner <= 4:
                    head, other = old[layer][:, ranked[i]], old[layer][:, ranked[partner]]
                    want[layer][:, ranked[i]] = head + (head - other)
    got = jax.jit(lambda params: merge_query_heads(plan, scores, params))(params)
    np.testing.assert_allclose(got["layers"]["attention"]["query"], want, rtol=1e-6)
    assert (group == 4) == np.array_equal(want, old)
    np.testing.assert_array_equal(
        got["layers"]["attention"]["value"], params["layers"]["attention"]["value"]
    )
