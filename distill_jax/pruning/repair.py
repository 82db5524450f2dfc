"""Least-squares repair: what a projection read from dropped inputs, it now reads from kept ones.

A linear map W sees X = [X_kept, X_dropped]. The best linear guess of the dropped inputs from the
kept ones over the calibration tokens is X_kept A with A = (G_kk + ridge)^-1 G_kd, G = X^T X; so the
rows of W that survive become W_kept + A W_dropped, the ridge solution of the least squares problem
X_kept W' ~ X W. Meta's "adjusting the magnitude of the weights" in closed form; compare the
interpolative decompositions of Chee et al. 2022.

Dimensions as in `distill_jax.models`; I inputs and O outputs of a projection, with L' kept layers.
"""

import functools
from collections.abc import Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from distill_jax import models, parallel
from distill_jax.artifacts import InputError
from distill_jax.pruning.activations import Batch, tokens_and_segments
from distill_jax.pruning.elimination import exact_dot, solve_positive
from distill_jax.pruning.plan import Plan

Tree = TypeVar("Tree")

Grams = dict[str, Array]
"""X^T X of projections' inputs by name, float32 [L, I, I] ("final": [I, I]), and "tokens" []."""

_READERS = {
    "attention_input": ("attention", ("query", "key", "value")),
    "heads": ("attention", ("output",)),
    "mlp_input": ("mlp", ("gate", "up")),
    "neurons": ("mlp", ("down",)),
}
"""Activation -> the projections that read it."""

_NORMED = ("attention_input", "mlp_input")
"""Activations that come straight out of a norm."""

_MATRIX_AXES = ("layers", "rows", "columns")
_MATRIX_RULES = {"layers": (), "rows": ("fsdp", "fsdp_minor"), "columns": ("tensor",)}


def grams(
    model: models.Model, plan: Plan, batches: Iterable[Batch], *, mesh: Mesh | None = None
) -> Grams:
    """Sums X^T X over calibration tokens for each activation that the plan cuts.

    One forward pass; memory is that of the matrices, L F^2 for the largest, split over the mesh.

    Args:
      model: the model before pruning.
      plan: says which activations lose a part.
      batches: calibration batches; padding is left out.
      mesh: where rows and matrices are split; None leaves that to JAX.

    Raises:
      InputError: there are no batches.
    """
    names = cut_inputs(plan)
    if not names:
        return {}
    sharding = parallel.batch_sharding(mesh) if mesh else None
    total: Grams | None = None
    for batch in batches:
        tokens, segments = tokens_and_segments(batch, sharding)
        new = batch_grams(model.params, tokens, segments, model.config, names, mesh)
        total = new if total is None else _add(total, new)
    if total is None:
        raise InputError("there are no calibration batches for the repair")
    return total


def repair(
    plan: Plan,
    params: models.Params,
    sums: Grams,
    *,
    ridge: float = 1e-2,
    mesh: Mesh | None = None,
) -> models.Params:
    """Parameters of the FULL model whose cut by `apply_plan` is the repaired student.

    Only rows that the plan keeps change, and only of projections whose inputs are cut; where those
    come out of a norm, what a row grows by is put into the norm's weight. Pure and jit-able:
    `jit(lambda params, sums: apply_plan(plan, repair(plan, params, sums)))`.

    A tied unembedding is left alone, since its matrix is the embedding too.

    Args:
      plan: what will be kept.
      params: the full model's parameters.
      sums: of `grams`.
      ridge: added to each kept input's power, as a fraction of that power, together with kept
        inputs / tokens: coefficients that few tokens cannot determine shrink towards the plain
        cut, which would otherwise be the better student.
      mesh: where parameters live; None leaves to JAX how the work is split. With one, under
        `jax.jit`, no device holds more than a layer's matrices whole.
    """
    kept = _kept(plan)
    layers = dict(params["layers"])
    for name, (block, readers) in _READERS.items():
        if name in sums:
            weights = tuple(layers[block][reader] for reader in readers)
            damping = ridge + kept[name].shape[-1] / sums["tokens"]
            new = _absorb(weights, sums[name], plan.layers, kept[name], damping, mesh)
            if name in _NORMED:
                norm, new = balance(layers[block]["norm"], weights, new)
                layers[block] = layers[block] | {"norm": norm}
            layers[block] = layers[block] | dict(zip(readers, new, strict=True))
    params = params | {"layers": layers}
    if "final" in sums:
        weights = (params["unembedding"][None],)
        damping = ridge + kept["final"].shape[-1] / sums["tokens"]
        new = _absorb(weights, sums["final"][None], np.zeros(1, int), kept["final"], damping, mesh)
        norm, new = balance(params["final_norm"][None], weights, new)
        params = params | {"final_norm": norm[0], "unembedding": new[0][0]}
    return params


def _kept(plan: Plan) -> dict[str, np.ndarray]:
    """Kept inputs [L', I'] of every activation; heads and their channels count as one axis."""
    embed = np.broadcast_to(plan.embed, (len(plan.layers), len(plan.embed)))
    heads = plan.heads[..., None] * plan.source.head_dim + plan.head_dim
    kept = {
        "attention_input": embed,
        "heads": heads.reshape(len(plan.layers), -1),
        "mlp_input": embed,
        "neurons": plan.mlp,
    }
    return kept if plan.target.tied else kept | {"final": plan.embed[None]}


def cut_inputs(plan: Plan) -> tuple[str, ...]:
    """The activations that lose a part, in the order in which they are computed."""
    return tuple(name for name, kept in _kept(plan).items() if kept.shape[-1] < _width(plan, name))


def _width(plan: Plan, name: str) -> int:
    source = plan.source
    return {"heads": source.heads * source.head_dim, "neurons": source.mlp}.get(name, source.embed)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def batch_grams(
    params: models.Params,
    tokens_BT: Array,
    segment_ids_BT: Array,
    config: models.LlamaConfig,
    names: tuple[str, ...],
    mesh: Mesh | None,
) -> Grams:
    """Of one batch, for the activations of these names."""
    where_BT = segment_ids_BT > 0

    def gram(x: Array) -> Array:
        # Rows stay split: matrices of which channels are split would have all tokens gathered.
        x = split_rows(x.reshape(*where_BT.shape, -1), mesh)
        x = jnp.where(where_BT[..., None], x, 0)
        # Split here already: of the matrices of all layers no device may hold the whole.
        return split_matrices(
            jnp.einsum("BTI,BTJ->IJ", x, x, preferred_element_type=jnp.float32), mesh
        )

    hidden, sums = models.hidden_states(
        config,
        params,
        tokens_BT,
        segment_ids_BT,
        observe=lambda layer: {name: gram(layer[name]) for name in names if name != "final"},
        rows=parallel.batch_sharding(mesh) if mesh else None,
    )
    if "final" in names:
        sums["final"] = gram(hidden)
    sums = split_matrices(sums, mesh)
    sums["tokens"] = jnp.sum(where_BT, dtype=jnp.float32)
    return sums


def split_matrices(tree: Tree, mesh: Mesh | None) -> Tree:
    """Matrices [..., rows, columns], split over the mesh."""
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, matrix_shardings(tree, mesh))


def split_rows(array: Array, mesh: Mesh | None) -> Array:
    """Split over its first axis, as batches are."""
    if mesh is None:
        return array
    return jax.lax.with_sharding_constraint(array, parallel.batch_sharding(mesh))


def matrix_shardings(tree: Any, mesh: Mesh) -> Any:
    """How `split_matrices` does it."""
    axes = jax.tree.map(lambda x: _MATRIX_AXES[-x.ndim :], tree)
    return parallel.shardings(mesh, axes, tree, _MATRIX_RULES)


@functools.partial(jax.jit, donate_argnums=0)
def _add(total: Grams, new: Grams) -> Grams:
    return jax.tree.map(jnp.add, total, new)


def _absorb(
    weights: tuple[Array, ...],
    gram_LII: Array,
    layers: np.ndarray,
    kept: np.ndarray,
    damping: Array,
    mesh: Mesh | None,
) -> tuple[Array, ...]:
    """Each weight [L, inputs..., outputs...] with its kept rows reading for the dropped ones."""
    L, inputs, _ = gram_LII.shape
    everything = np.arange(inputs)
    dropped = np.stack([np.setdiff1d(everything, row) for row in kept])

    def one(layer: tuple[tuple[Array, ...], Array, Array, Array]) -> tuple[Array, ...]:
        weights_IO, gram, kept, dropped = layer
        guess = _regression(gram, kept, dropped, damping, mesh)

        def absorbed(weight_IO: Array) -> Array:
            wide = weight_IO.astype(jnp.float32)
            rows = wide[kept] + exact_dot(guess, wide[dropped])
            return weight_IO.at[kept].set(rows.astype(weight_IO.dtype))

        return split_matrices(tuple(map(absorbed, weights_IO)), mesh)

    flat = tuple(jnp.asarray(weight).reshape(L, inputs, -1) for weight in weights)
    chosen = tuple(weight[layers] for weight in flat)
    new = jax.lax.map(one, (chosen, gram_LII[layers], jnp.asarray(kept), jnp.asarray(dropped)))
    return tuple(
        weight.at[layers].set(layer).reshape(old.shape)
        for weight, layer, old in zip(flat, new, weights, strict=True)
    )


@jax.jit
def balance(
    norm_LD: Array, old: tuple[Array, ...], new: tuple[Array, ...]
) -> tuple[Array, tuple[Array, ...]]:
    """Moves the growth of each channel's weights into the norm before them; the function stays.

    A channel that its norm makes quiet needs enormous weights to speak for others, and through
    them the norm's gradient is enormous: a first step of Adam would then destroy the student.
    """

    def power(weights: tuple[Array, ...]) -> Array:
        rows = (w.astype(jnp.float32).reshape(*norm_LD.shape, -1) for w in weights)
        return sum((jnp.sum(jnp.square(row), axis=-1) for row in rows), jnp.zeros(norm_LD.shape))

    before, after = power(old), power(new)
    growth = jnp.where((before > 0) & (after > 0), jnp.sqrt(after / before), 1.0)
    norm = (norm_LD.astype(jnp.float32) * growth).astype(norm_LD.dtype)
    shrunk = (
        (w / growth.reshape(norm_LD.shape + (1,) * (w.ndim - 2))).astype(w.dtype) for w in new
    )
    return norm, tuple(shrunk)


def _regression(
    gram: Array, kept: Array, dropped: Array, damping: Array, mesh: Mesh | None
) -> Array:
    """Ridge coefficients [I', I - I'] that predict dropped inputs from kept ones.

    Inputs are scaled to unit power first: the damping then weighs on all of them alike, though a
    few channels of a Llama are a thousand times louder than the rest, and float32 suffices.
    """
    power = jnp.diagonal(gram)
    size = jnp.sqrt(jnp.where(power > 0, power, 1.0))
    correlation = gram / size[:, None] / size[None, :]
    inner = correlation[kept][:, kept]
    coefficients = solve_positive(
        inner + damping * jnp.eye(len(kept)), correlation[kept][:, dropped], mesh
    )
    return coefficients * size[dropped] / size[kept][:, None]
