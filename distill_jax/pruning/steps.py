"""The compiled steps of `repair_in_sequence`: what runs for every batch, and for every layer.

Each has a mesh as its last argument. It places rows, layers and matrices there, so that no step
leaves where its result lies to the compiler, and the planner compiles what will run; None leaves it
to JAX.

Dimensions as in `distill_jax.models`; E is the student's D, I inputs of a fit.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from distill_jax import models, parallel
from distill_jax.models import llama
from distill_jax.pruning.elimination import exact_dot
from distill_jax.pruning.least_squares import Sums, sums_of
from distill_jax.pruning.repair import balance, split_rows

Layer = dict[str, dict[str, Array]]
"""Parameters of one layer."""

READERS = {"attention": ("query", "key", "value"), "mlp": ("gate", "up")}
"""What reads the stream after a block's norm."""

WRITERS = {"attention": "output", "mlp": "down"}
"""What writes to the stream at a block's end."""


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def layer_at(config: models.LlamaConfig, stacked: Any, index: int, mesh: Mesh | None) -> Layer:
    """One layer of a model's stacked ones."""
    layer = jax.tree.map(lambda leaf: leaf[index], stacked)
    if mesh is None:
        return layer
    return jax.lax.with_sharding_constraint(layer, layer_shardings(config, mesh))


def layer_shardings(config: models.LlamaConfig, mesh: Mesh) -> Layer:
    """Where `layer_at` puts one."""
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype),
        models.abstract_params(config)["layers"],
    )
    axes = jax.tree.map(
        lambda names: names[1:],
        models.logical_axes(config)["layers"],
        is_leaf=lambda x: isinstance(x, tuple),
    )
    return parallel.shardings(mesh, axes, shapes)


@functools.partial(jax.jit, static_argnames="mesh")
def embed(embedding_VD: Array, tokens_BT: Array, mesh: Mesh | None) -> Array:
    """The stream before the first layer."""
    return split_rows(embedding_VD[tokens_BT], mesh)


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def full_layer(
    config: models.LlamaConfig, layer: Layer, x_BTD: Array, segments_BT: Array, mesh: Mesh | None
) -> tuple[Array, Array]:
    """The stream after attention, and after the MLP."""
    block = llama.block(config, layer)
    added, _, _ = block.attention(x_BTD, *_surroundings(config, segments_BT, mesh), None)
    middle = split_rows(x_BTD + added, mesh)
    added, _ = block.mlp(middle)
    return middle, split_rows(middle + added, mesh)


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def heads(
    config: models.LlamaConfig, layer: Layer, x_BTE: Array, segments_BT: Array, mesh: Mesh | None
) -> Array:
    """What the output projection reads, [B, T, H C]."""
    block = llama.block(config, layer)
    _, _, seen = block.attention(x_BTE, *_surroundings(config, segments_BT, mesh), None)
    return split_rows(seen["heads"].reshape(*segments_BT.shape, -1), mesh)


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def neurons(config: models.LlamaConfig, layer: Layer, x_BTE: Array, mesh: Mesh | None) -> Array:
    """What the down projection reads, [B, T, F]."""
    return split_rows(llama.block(config, layer).mlp(x_BTE)[1]["neurons"], mesh)


def _surroundings(
    config: models.LlamaConfig, segments_BT: Array, mesh: Mesh | None
) -> tuple[Any, llama.Attend]:
    angles = llama.rotary_angles(config, llama.segment_positions(segments_BT))
    rows = parallel.batch_sharding(mesh) if mesh else None
    return angles, llama.segment_attention(segments_BT, rows=rows)


@functools.partial(jax.jit, static_argnames="mesh")
def writer_sums(
    inputs_BTI: Array,
    start_IE: Array,
    wanted_BTD: Array,
    stream_BTE: Array,
    segments_BT: Array,
    kept: Array,
    mesh: Mesh | None,
) -> Sums:
    """Of a projection that writes to the stream: what it reads, and what the stream lacks."""
    wanted = wanted_BTD.astype(jnp.float32)
    power_BT = jnp.mean(jnp.square(wanted), axis=-1)
    weight_BT = jnp.where(segments_BT > 0, 1 / jnp.maximum(power_BT, 1e-30), 0)
    lacking = wanted[..., kept] - (stream_BTE + inputs_BTI @ start_IE)
    return sums_of(inputs_BTI, lacking, weight_BT, mesh)


@functools.partial(jax.jit, static_argnames=("eps", "mesh"))
def reader_sums(
    norm_E: Array,
    full_norm_D: Array,
    stream_BTE: Array,
    full_BTD: Array,
    segments_BT: Array,
    kept: Array,
    eps: float,
    mesh: Mesh | None,
) -> Sums:
    """Of what reads the stream: the student's normed stream, and what the full one has beside."""
    inputs = llama.rms_norm(stream_BTE, norm_E, eps)
    lacking = llama.rms_norm(full_BTD, full_norm_D, eps).at[..., kept].add(-inputs)
    return sums_of(inputs, lacking, (segments_BT > 0).astype(jnp.float32), mesh)


@functools.partial(jax.jit, static_argnames=("axes", "mesh"))
def change(old: Array, change_IE: Array, axes: tuple[str, ...], mesh: Mesh | None) -> Array:
    """A projection [..., E] of these logical axes and its change."""
    new = (old.astype(jnp.float32) + change_IE.reshape(old.shape)).astype(old.dtype)
    if mesh is None:
        return new
    return jax.lax.with_sharding_constraint(new, parallel.shardings(mesh, axes, new))


@functools.partial(jax.jit, static_argnames="mesh")
def write(stream_BTE: Array, inputs_BTI: Array, weight_IE: Array, mesh: Mesh | None) -> Array:
    """The stream after a projection."""
    return split_rows(stream_BTE + (inputs_BTI @ weight_IE), mesh)


@functools.partial(jax.jit, static_argnames=("axes", "mesh"))
def read(
    guess_ED: Array,
    norm_E: Array,
    old: Mapping[str, Array],
    full: Mapping[str, Array],
    kept: Mapping[str, Array],
    scales: Mapping[str, Any],
    axes: tuple[tuple[str, tuple[str, ...]], ...],
    mesh: Mesh | None,
) -> tuple[Array, dict[str, Array]]:
    """Projections of the full normed stream, as ones of the student's that it is guessed from.

    Args:
      guess_ED: the full normed stream as a linear map of the student's.
      norm_E: the weight of the student's norm.
      old: the student's projections [E, ...] as they were cut, by name.
      full: the full model's, [D, ...].
      kept: indices by logical axis, of those axes of the projections that are not the stream's.
      scales: factors of the projections that have one.
      axes: the logical axes of each projection.
      mesh: where parameters live.

    Returns:
      The norm's weight and the projections, balanced (see `repair.balance`).
    """
    new = {}
    for name, names in axes:
        cut = full[name]
        for axis, logical in enumerate(names[1:], start=1):
            if logical in kept:
                cut = jnp.take(cut, kept[logical], axis=axis, mode="clip")
        flat = cut.astype(jnp.float32).reshape(cut.shape[0], -1)
        through = exact_dot(guess_ED, flat) * scales.get(name, 1.0)
        new[name] = through.reshape(-1, *cut.shape[1:]).astype(old[name].dtype)
    order = [name for name, _ in axes]
    norm, balanced = balance(
        norm_E[None],
        tuple(old[name][None] for name in order),
        tuple(new[name][None] for name in order),
    )
    found = norm[0], {name: weight[0] for name, weight in zip(order, balanced, strict=True)}
    if mesh is None:
        return found
    places = parallel.shardings(mesh, (("embed",), dict(axes)), found)
    return jax.lax.with_sharding_constraint(found, places)
