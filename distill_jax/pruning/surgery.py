"""Surgery: a plan applied to a tree of arrays.

Dimensions as in `distill_jax.models`; a prime marks what is kept.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distill_jax import models, parallel
from distill_jax.artifacts import InputError
from distill_jax.pruning.plan import Plan

Tree = TypeVar("Tree")

# Layers go first: the per-layer indices of the other axes are given for kept layers.
_ORDER = ("layers", "embed", "head_dim", "mlp", "kv_heads", "heads")


def take(plan: Plan, tree: Tree, axes: Any, *, mesh: Mesh | None = None) -> Tree:
    """Keeps the plan's indices along every logical axis of every array of a tree.

    Pure and jit-able; works under `jax.eval_shape` and on sharded arrays. It serves whatever
    bears the model's axes: weights, gradients, optimizer moments.

    Args:
      plan: what to keep.
      tree: nested arrays.
      axes: the same nesting, with a tuple of axis names in each array's place, as
        `models.logical_axes` gives it. Names that the plan does not know ("vocab") stay whole.
      mesh: where sharded arrays live, under `jax.jit`. An axis that is cut is split no longer,
        another one is in its place, by an all-to-all: no device then holds a whole array. None
        leaves that to JAX, which sums whole results over the devices.
    """

    def cut(names: tuple[str, ...], leaf: jax.Array) -> jax.Array:
        for name in _ORDER:
            if name in names:
                leaf = _take_axis(leaf, getattr(plan, name), names, name, mesh)
        return leaf

    return jax.tree.map(cut, axes, tree, is_leaf=lambda x: isinstance(x, tuple))


def _take_axis(
    leaf: jax.Array, kept: np.ndarray, names: tuple[str, ...], name: str, mesh: Mesh | None
) -> jax.Array:
    axis = names.index(name)
    count = kept.shape[-1]
    if count == leaf.shape[axis] and (kept == np.arange(count)).all():
        return leaf
    if mesh is not None and name != "layers":
        leaf = jax.lax.with_sharding_constraint(leaf, _split_elsewhere(leaf, names, axis, mesh))
    if kept.ndim == 1:
        leaf = jnp.take(leaf, kept, axis=axis, mode="clip")
    else:
        layers = names.index("layers")
        inner = axis - (layers < axis)
        leaf = jax.vmap(
            lambda layer, index: jnp.take(layer, index, axis=inner, mode="clip"),
            in_axes=(layers, 0),
            out_axes=layers,
        )(leaf, kept)
    if mesh is not None:
        leaf = jax.lax.with_sharding_constraint(leaf, parallel.shardings(mesh, names, leaf))
    return leaf


def _split_elsewhere(
    leaf: jax.Array, names: tuple[str, ...], axis: int, mesh: Mesh
) -> NamedSharding:
    """The usual sharding, but what splits `axis` splits another axis instead."""
    spec = [parallel.names_of(entry) for entry in parallel.shardings(mesh, names, leaf).spec]
    moved, spec[axis] = spec[axis], ()

    def fits(other: int) -> bool:
        parts = math.prod(mesh.shape[name] for name in (*spec[other], *moved))
        return other != axis and names[other] != "layers" and leaf.shape[other] % parts == 0

    others = [other for other in range(leaf.ndim) if moved and fits(other)]
    if others:
        # An axis that is whole before anything else: the move is then a plain all-to-all.
        place = max(others, key=lambda other: (not spec[other], leaf.shape[other]))
        spec[place] += moved
    return NamedSharding(mesh, PartitionSpec(*(entry or None for entry in spec)))


def take_layer(plan: Plan, array: Any, names: tuple[str, ...], layer: int | None) -> Any:
    """`take` of one layer's array, NumPy's or JAX's: what survives of kept layer `layer`.

    Args:
      plan: what to keep.
      array: of the source model's layer `plan.layers[layer]`, or outside the layers.
      names: its axes, without "layers".
      layer: number of the kept layer, or None outside the layers.
    """
    for axis, name in enumerate(names):
        if name in _ORDER:
            kept = getattr(plan, name)
            array = array.take(kept if kept.ndim == 1 else kept[layer], axis=axis)
    return array


def apply_plan(plan: Plan, params: models.Params, *, mesh: Mesh | None = None) -> models.Params:
    """The pruned model's parameters.

    `take`, then what keeps the function, see `weight_scales`; an untied source becomes a tied
    target by dropping its unembedding.

    The result computes exactly what the source computes with the dropped layers skipped, heads and
    neurons silenced, head channels zeroed, and its norms taken over the kept channels with
    the scaled weights. Pure and jit-able, like `take`, whose `mesh` it passes on.
    """
    axes = models.logical_axes(plan.source)
    if plan.target.tied and not plan.source.tied:
        params, axes = _without_unembedding(params), _without_unembedding(axes)
    cut = take(plan, params, axes, mesh=mesh)
    scales = weight_scales(plan)

    def scaled(path: tuple[Any, ...], weight: jax.Array) -> jax.Array:
        factor = scales.get(tuple(key.key for key in path))
        if factor is None:
            return weight
        factor = factor.reshape(factor.shape + (1,) * (weight.ndim - factor.ndim))
        return (weight.astype(jnp.float32) * factor).astype(weight.dtype)

    return jax.tree_util.tree_map_with_path(scaled, cut)


def jit_cut(plan: Plan, mesh: Mesh | None) -> Any:
    """`apply_plan`, jitted: parameters in, the pruned ones where they live on the mesh out."""
    cut = functools.partial(apply_plan, plan, mesh=mesh)
    return jax.jit(cut, out_shardings=target_shardings(plan, mesh))


def target_shardings(plan: Plan, mesh: Mesh | None) -> Any | None:
    """Where the pruned model's parameters live; None leaves that to JAX."""
    if mesh is None:
        return None
    shapes = models.abstract_params(plan.target)
    return parallel.shardings(mesh, models.logical_axes(plan.target), shapes)


def weight_scales(plan: Plan) -> dict[tuple[str, ...], np.ndarray]:
    """Factors that keep the function, by the path of the parameter: float32 [L'], or [].

    Query weights carry sqrt(C'/C), since scores are divided by sqrt(C') and no longer by sqrt(C);
    norm weights carry `plan.norm_scales`.
    """
    norms = {name: np.asarray(x, np.float32) for name, x in plan.norm_scales.items()}
    score_scale = np.sqrt(plan.target.head_dim / plan.source.head_dim)
    return {
        ("layers", "attention", "norm"): norms["attention"],
        ("layers", "attention", "query"): np.asarray(score_scale, np.float32),
        ("layers", "mlp", "norm"): norms["mlp"],
        ("final_norm",): norms["final"][0],
    }


def take_state(plan: Plan, state: Tree, *, mesh: Mesh | None = None) -> Tree:
    """An optimizer's state of the source model, cut as the parameters are.

    Every part of the state that mirrors the parameters (Adam's moments, momentum, accumulated
    gradients, averaged weights) goes through `take`; numbers such as the step stay. The factors
    of `apply_plan` are not applied: they would divide a first moment and the root of a second
    alike, and Adam's step is their ratio.

    Args:
      plan: what to keep.
      state: of any Optax transformation over the source model's parameters.
      mesh: of `take`.

    Raises:
      InputError: an array of the state belongs to no part that mirrors the parameters, as factored
        moments do not.
    """
    axes = models.logical_axes(plan.source)
    params = _layout(models.abstract_params(plan.source))
    drops = plan.target.tied and not plan.source.tied

    def mirrors(node: Any) -> bool:
        return _layout(node) == params

    def cut(path: tuple[Any, ...], node: Any) -> Any:
        if mirrors(node):
            drop: Callable[[Any], Any] = _without_unembedding if drops else lambda tree: tree
            return take(plan, drop(node), drop(axes), mesh=mesh)
        if jnp.ndim(node) > 0:
            name = jax.tree_util.keystr(path)
            raise InputError(
                f"optimizer state{name} of shape {jnp.shape(node)} does not mirror the parameters"
            )
        return node

    return jax.tree_util.tree_map_with_path(cut, state, is_leaf=mirrors)


def _layout(tree: Any) -> list[tuple[str, tuple[int, ...]]]:
    """The place and the shape of every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), jnp.shape(leaf)) for path, leaf in leaves]


def _without_unembedding(tree: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in tree.items() if name != "unembedding"}
