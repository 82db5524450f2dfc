"""One token of every row through a model, beside a cache of keys and values.

A step of few rows costs what moving the weights costs. So they are laid out once as XLA's CPU
multiplies fastest with few columns: one matrix for each product of each layer, [out, in], read
where it lies; a scan over stacked layers would copy each of them in every step.

Dimensions: R rows, S cache slots, N = H*C; J = 2, gate and up; G = H/K + 2, the queries that share
a key/value head, its key and its value; the rest as in `llama`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax.models.config import LlamaConfig
from distill_jax.models.llama import Params, rms_norm, rotary_angles, rotate


class Cache(NamedTuple):
    """One layer's keys and values; the slots of a key's component lie side by side."""

    key_RKCS: Array
    value_RKSC: Array


class Layer(NamedTuple):
    """One layer's weights."""

    attention_norm_D: Array
    attention_KGCD: Array
    output_DN: Array
    mlp_norm_D: Array
    gate_up_FJD: Array
    down_DF: Array


class Weights(NamedTuple):
    """One model's weights."""

    embedding_VD: Array
    layers: tuple[Layer, ...]
    final_norm_D: Array
    unembedding_VD: Array


def arrange(config: LlamaConfig, params: Params) -> Weights:
    """The weights as `forward` multiplies with them."""
    attention, mlp = params["layers"]["attention"], params["layers"]["mlp"]
    by_head = (config.layers, config.embed, config.kv_heads, -1, config.head_dim)
    joined_LDKGC = jnp.concatenate(
        [attention[name].reshape(by_head) for name in ("query", "key", "value")], axis=3
    )
    stacked = Layer(
        attention_norm_D=attention["norm"],
        attention_KGCD=joined_LDKGC.transpose(0, 2, 3, 4, 1),
        output_DN=attention["output"].reshape(config.layers, -1, config.embed).swapaxes(1, 2),
        mlp_norm_D=mlp["norm"],
        gate_up_FJD=jnp.stack((mlp["gate"], mlp["up"]), axis=-1).transpose(0, 2, 3, 1),
        down_DF=mlp["down"].swapaxes(1, 2),
    )
    # Not `unembedding(params).T`: what goes through untouched is not copied.
    head_VD = params["embedding"] if config.tied else params["unembedding"].T
    return Weights(
        params["embedding"], unstack(stacked, config.layers), params["final_norm"], head_VD
    )


def weights_sharding(params: Params) -> Weights | None:
    """Where `arrange` leaves weights: split as the parameters are, if they lie on a mesh."""
    places = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params)]
    if not all(isinstance(place, NamedSharding) for place in places):
        return None
    attention, mlp = params["layers"]["attention"], params["layers"]["mlp"]

    def split_as(leaf: Any, *axes: int | None) -> Any:
        """One whose axes are these of the leaf's; None: new ones."""
        spec = (*leaf.sharding.spec, *(None for _ in leaf.shape))
        names = (None if axis is None else spec[axis] for axis in axes)
        return NamedSharding(leaf.sharding.mesh, PartitionSpec(*names))

    layer = Layer(
        attention_norm_D=split_as(attention["norm"], 1),
        attention_KGCD=split_as(attention["key"], 2, None, 3, 1),
        output_DN=split_as(attention["output"], 3, 1),
        mlp_norm_D=split_as(mlp["norm"], 1),
        gate_up_FJD=split_as(mlp["gate"], 2, None, 1),
        down_DF=split_as(mlp["down"], 2, 1),
    )
    embedding_VD = split_as(params["embedding"], 0, 1)
    untied = "unembedding" in params
    return Weights(
        embedding_VD,
        (layer,) * attention["norm"].shape[0],
        split_as(params["final_norm"], 0),
        split_as(params["unembedding"], 1, 0) if untied else embedding_VD,
    )


def unstack(tree: Any, count: int) -> tuple[Any, ...]:
    """The slices of every leaf along its first axis, as so many trees."""
    return tuple(jax.tree.map(lambda leaf, i=index: leaf[i], tree) for index in range(count))


def forward(
    config: LlamaConfig,
    weights: Weights,
    caches: tuple[Cache, ...],
    token_R: Array,
    start_R: Array,
    slot: Array,
) -> tuple[Array, tuple[Cache, ...]]:
    """Next logits [R, V] in float32, and the caches with the tokens in them.

    Args:
      config: the model's shape.
      weights: its weights.
      caches: of each layer.
      token_R: one token a row.
      start_R: the slot of each row's first token.
      slot: that of these tokens.
    """
    slots = jnp.arange(caches[0].key_RKCS.shape[-1])
    visible_RS = (slots >= start_R[:, None]) & (slots <= slot)
    angles = rotary_angles(config, (slot - start_R)[:, None])
    x_DR = weights.embedding_VD[token_R].T
    new = []
    for layer, cache in zip(weights.layers, caches):
        added_DR, cache = _attention(config, layer, x_DR, angles, cache, slot, visible_RS)
        new.append(cache)
        x_DR += added_DR
        x_DR += _mlp(config, layer, x_DR)
    hidden_DR = _norm(config, x_DR, weights.final_norm_D)
    logits_VR = jnp.dot(weights.unembedding_VD, hidden_DR, preferred_element_type=jnp.float32)
    # Without the barrier XLA would transpose the product itself, which then takes longer.
    return jax.lax.optimization_barrier(logits_VR).T, tuple(new)


def _norm(config: LlamaConfig, x_DR: Array, weight_D: Array) -> Array:
    return rms_norm(x_DR.T, weight_D, config.norm_eps).T


def _attention(
    config: LlamaConfig,
    layer: Layer,
    x_DR: Array,
    angles: tuple[Array, Array],
    cache: Cache,
    slot: Array,
    visible_RS: Array,
) -> tuple[Array, Cache]:
    """What attention adds to each row, and the cache with the row's key and value in `slot`."""
    normed_DR = _norm(config, x_DR, layer.attention_norm_D)
    joined_RKGC = jnp.einsum("KGCD,DR->KGCR", layer.attention_KGCD, normed_DR).transpose(3, 0, 1, 2)
    rotated_RKGC = rotate(joined_RKGC[:, :, :-1], angles)
    query_RKGC = rotated_RKGC[:, :, :-1].astype(jnp.float32) * config.head_dim**-0.5
    put = jax.lax.dynamic_update_index_in_dim
    key_RKCS = put(cache.key_RKCS, rotated_RKGC[:, :, -1], slot, 3)
    value_RKSC = put(cache.value_RKSC, joined_RKGC[:, :, -1], slot, 2)
    # Plain sums: a product of two matrices for each row and head costs more than it computes.
    scores_RKGS = jnp.sum(query_RKGC[..., None] * key_RKCS[:, :, None], axis=3)
    scores_RKGS = jnp.where(visible_RS[:, None, None], scores_RKGS, -jnp.inf)
    shares_RKGS = jax.nn.softmax(scores_RKGS)
    heads_RKGC = jnp.sum(shares_RKGS[..., None] * value_RKSC[:, :, None], axis=3)
    heads_RN = heads_RKGC.reshape(x_DR.shape[1], -1).astype(x_DR.dtype)
    return layer.output_DN @ heads_RN.T, Cache(key_RKCS, value_RKSC)


def _mlp(config: LlamaConfig, layer: Layer, x_DR: Array) -> Array:
    normed_DR = _norm(config, x_DR, layer.mlp_norm_D)
    both_FJR = jnp.einsum("FJD,DR->FJR", layer.gate_up_FJD, normed_DR)
    return layer.down_DF @ (jax.nn.silu(both_FJR[:, 0]) * both_FJR[:, 1])
