"""Key/value heads merged into one: what `plan.merged_kv_heads` asks of the parameters."""

import jax
import jax.numpy as jnp

from distill_jax import models
from distill_jax.pruning.plan import Plan


def merge_kv_heads(plan: Plan, params: models.Params) -> models.Params:
    """Parameters of the FULL model whose key/value heads are the means of the plan's groups.

    Of a group each member's key and value weights become the group's mean (GQA, Ainslie et al.
    2023), in the layers that the plan keeps, so that all its query heads may read from any of
    them; keys are averaged before the rotation, with which the mean commutes. The shape stays:
    `apply_plan` then keeps one head of each group. Without groups nothing changes.

    Pure and jit-able: `apply_plan(plan, repair(plan, merge_kv_heads(plan, params), sums))`.
    """
    groups = plan.merged_kv_heads
    if groups is None:
        return params
    members = jnp.asarray(groups.reshape(len(groups), -1))

    def merged(weight: jax.Array) -> jax.Array:
        """Of a weight [L, D, K, C]."""

        def one(layer_DKC: jax.Array, members: jax.Array) -> jax.Array:
            D, _, C = layer_DKC.shape
            grouped = layer_DKC[:, members].astype(jnp.float32).reshape(D, *groups.shape[1:], C)
            mean = jnp.broadcast_to(grouped.mean(axis=2, keepdims=True), grouped.shape)
            return layer_DKC.at[:, members].set(mean.reshape(D, -1, C).astype(weight.dtype))

        weight = jnp.asarray(weight)
        return weight.at[plan.layers].set(jax.vmap(one)(weight[plan.layers], members))

    attention = params["layers"]["attention"]
    attention = attention | {name: merged(attention[name]) for name in ("key", "value")}
    return params | {"layers": params["layers"] | {"attention": attention}}
