"""Surgery: a plan applied to a tree of arrays."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import models
from distill_jax.pruning.plan import Plan

Tree = TypeVar("Tree")

# Layers go first: the per-layer indices of the other axes are given for kept layers.
_ORDER = ("layers", "embed", "head_dim", "mlp", "kv_heads", "heads")


def take(plan: Plan, tree: Tree, axes: Any) -> Tree:
    """Keeps the plan's indices along every logical axis of every array of a tree.

    Pure and jit-able; works under `jax.eval_shape` and on sharded arrays. It serves whatever
    bears the model's axes: weights, gradients, optimizer moments.

    Args:
      plan: what to keep.
      tree: nested arrays.
      axes: the same nesting, with a tuple of axis names in each array's place, as
        `models.logical_axes` gives it. Names that the plan does not know ("vocab") stay whole.
    """

    def cut(names: tuple[str, ...], leaf: jax.Array) -> jax.Array:
        for name in _ORDER:
            if name in names:
                leaf = _take_axis(leaf, getattr(plan, name), names, name)
        return leaf

    return jax.tree.map(cut, axes, tree, is_leaf=lambda x: isinstance(x, tuple))


def _take_axis(leaf: jax.Array, kept: np.ndarray, names: tuple[str, ...], name: str) -> jax.Array:
    axis = names.index(name)
    if kept.ndim == 1:
        return jnp.take(leaf, kept, axis=axis, mode="clip")
    layers = names.index("layers")
    inner = axis - (layers < axis)
    return jax.vmap(
        lambda layer, index: jnp.take(layer, index, axis=inner, mode="clip"),
        in_axes=(layers, 0),
        out_axes=layers,
    )(leaf, kept)


def apply_plan(plan: Plan, params: models.Params) -> models.Params:
    """The pruned model's parameters.

    `take`, then what keeps the function: the query weights carry sqrt(C'/C), since scores are
    divided by sqrt(C') and no longer by sqrt(C); the norm weights carry `plan.norm_scales`; an
    untied source becomes a tied target by dropping its unembedding.

    The result computes exactly what the source computes with the dropped layers skipped, heads and
    neurons silenced, head channels zeroed, and its norms taken over the kept channels with
    the scaled weights. Pure and jit-able, like `take`.
    """
    axes = models.logical_axes(plan.source)
    if plan.target.tied and not plan.source.tied:
        params = {name: x for name, x in params.items() if name != "unembedding"}
        axes = {name: x for name, x in axes.items() if name != "unembedding"}
    cut = take(plan, params, axes)
    attention, mlp = cut["layers"]["attention"], cut["layers"]["mlp"]
    score_scale = np.sqrt(plan.target.head_dim / plan.source.head_dim)
    scales = plan.norm_scales
    return cut | {
        "layers": {
            "attention": attention
            | {
                "norm": _scaled(attention["norm"], scales["attention"][:, None]),
                "query": _scaled(attention["query"], score_scale),
            },
            "mlp": mlp | {"norm": _scaled(mlp["norm"], scales["mlp"][:, None])},
        },
        "final_norm": _scaled(cut["final_norm"], scales["final"]),
    }


def _scaled(weight: jax.Array, factor: Any) -> jax.Array:
    """weight * factor in the weight's own type."""
    return (weight.astype(jnp.float32) * factor).astype(weight.dtype)
