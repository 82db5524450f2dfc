"""Minitron's head merging: what query heads lose is added to those that stay."""

import jax.numpy as jnp
import numpy as np

from distill_jax import models
from distill_jax.pruning.plan import Plan
from distill_jax.pruning.scores import Scores


def merge_query_heads(plan: Plan, scores: Scores, params: models.Params) -> models.Params:
    """Parameters of the FULL model whose last kept query heads carry the residual of dropped ones.

    Of a group of G query heads by falling score, G' of which stay, head i becomes
    head_i + (head_i - head_{2G'-i+1}) for i from max(1, 2G' - G + 1) to G': the last that stays
    answers for the first that goes, and so on (Minitron, Muralidharan et al. 2024, 2.3, who rank
    each axis by importance first and, with grouped queries, do this to query heads alone).

    Where the paper leaves room: its range begins at i = 2G' - G, whose partner would be head
    G + 1, which there is not, so ours begins one later; it counts all heads, while here each
    key/value head's group is merged by itself, as its queries are made for that head's keys; it
    does not say which weights a head is, here they are the query's. Without grouped queries
    (G = 1) it merges whole heads, and this does nothing. NVIDIA's Model Optimizer, which prunes
    by Minitron's scores, sorts and slices heads and merges none. Pure and jit-able; `apply_plan`
    follows.
    """
    source, target = plan.source, plan.target
    old, new = source.heads // source.kv_heads, target.heads // target.kv_heads
    first = max(2 * new - old, 0)
    if old == new:
        return params
    groups = plan.kv_heads[..., None] * old + np.arange(old)
    of_group = scores.heads[plan.layers[:, None, None], groups]
    ranked = np.take_along_axis(groups, np.argsort(-of_group, axis=-1, kind="stable"), axis=-1)
    kept = ranked[..., first:new].reshape(len(plan.layers), -1)
    gone = ranked[..., new : 2 * new - first][..., ::-1].reshape(kept.shape)
    layers = plan.layers[:, None]
    attention = params["layers"]["attention"]
    query_LHDC = jnp.moveaxis(jnp.asarray(attention["query"]), 2, 1)
    merged = 2 * query_LHDC[layers, kept] - query_LHDC[layers, gone]
    query = jnp.moveaxis(query_LHDC.at[layers, kept].set(merged), 1, 2)
    return params | {"layers": params["layers"] | {"attention": attention | {"query": query}}}
