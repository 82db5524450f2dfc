"""Llama in Flax NNX.

Modules declare parameters and say what they compute; everything outside this file works on the
plain nested dict of arrays that `init_params` returns, through the pure functions at the end.

Dimensions: B batch, T time, D embed, F mlp, H query heads, K kv heads, C head_dim, V vocab,
L layers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from distill_jax.models.attention import ATTENDED, Attend, segment_attention
from distill_jax.models.config import LlamaConfig, RopeScaling
from distill_jax.models.times import Times

Params = dict[str, Any]
"""Nested dict of arrays, as `init_params` makes it."""

Remat = Literal["none", "dots", "attention", "full"]
"""What the backward pass recomputes of a layer: nothing, all but matrix products and what attention
gives, all but the latter, all."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A model's shape and its parameters, which travel together.

    Attributes:
      config: the shape.
      params: the parameters, a tree as `init_params` makes it.
    """

    config: LlamaConfig
    params: Params


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the network comes by its parameters, for devices that hold shares of them.

    Attributes:
      lookup: (embedding_VD, tokens_BT) -> x_BTD.
      layer: of one layer's parameters, as stored, those that are computed with. What it gives is
        not kept for the backward pass.
      norm: of the final norm's weights those that are computed with.
      unembedding: of all parameters the matrix [D, V] that turns hidden states into logits.
    """

    lookup: Callable[[Array, Array], Array] = lambda table_VD, tokens_BT: table_VD[tokens_BT]
    layer: Callable[[Params], Params] | None = None
    norm: Callable[[Array], Array] = lambda weight_D: weight_D
    unembedding: Callable[[Params], Array] = lambda params: unembedding(params)

    @classmethod
    def of(cls, shares: Any) -> "Reading":
        """How devices read that hold `parallel.Shares` of the parameters."""

        def whole(params: Params) -> Array:
            name = "unembedding" if "unembedding" in params else "embedding"
            return unembedding({name: shares.whole(name)(params[name])})

        return cls(
            lookup=shares.lookup("embedding"),
            layer=shares.whole("layers"),
            norm=shares.whole("final_norm"),
            unembedding=whole,
        )


_INIT_SCALE = 0.02
_AS_READ = "as_read"


def rms_norm(x: Array, weight_D: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 (Zhang & Sennrich 2019)."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale * weight_D.astype(jnp.float32)).astype(x.dtype)


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Array:
    """Angular frequency in radians a token of each of the C/2 rotary pairs."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return frequency
    turns = scaling.original_context * frequency / (2 * jnp.pi)
    keep = (turns - scaling.low_frequency_factor) / (
        scaling.high_frequency_factor - scaling.low_frequency_factor
    )
    keep = jnp.clip(keep, 0.0, 1.0)
    return keep * frequency + (1 - keep) * frequency / scaling.factor


def rotary_angles(config: LlamaConfig, positions_BT: Array) -> tuple[Array, Array]:
    """Cosine and sine, each [B, T, 1, C/2], of every rotary pair at every position."""
    frequency = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    angle = positions_BT.astype(jnp.float32)[..., None, None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTHC: Array, angles: tuple[Array, Array]) -> Array:
    """Rotates pair (i, i + C/2) of every head, Hugging Face's layout (RoFormer, Su et al. 2021)."""
    cos, sin = angles
    first, second = jnp.split(x_BTHC.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return rotated.astype(x_BTHC.dtype)


def segment_positions(segment_ids_BT: Array) -> Array:
    """Position of each token inside its own segment; a segment is a run of equal ids."""
    time = jnp.arange(segment_ids_BT.shape[1])
    starts = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    starts = jnp.pad(starts, ((0, 0), (1, 0)), constant_values=True)
    return time - jax.lax.cummax(jnp.where(starts, time, 0), axis=1)


def _param(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], scale: float
) -> nnx.Param:
    return nnx.Param(scale * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


def _norm_weight(config: LlamaConfig) -> nnx.Param:
    return nnx.Param(jnp.ones((config.embed,), jnp.float32), axes=("embed",))


class Attention(nnx.Module):
    """Grouped-query self-attention with its norm, without the residual."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.config = config
        D, H, K, C = config.embed, config.heads, config.kv_heads, config.head_dim
        self.norm = _norm_weight(config)
        self.query = _param(rngs, (D, H, C), ("embed", "heads", "head_dim"), _INIT_SCALE)
        self.key = _param(rngs, (D, K, C), ("embed", "kv_heads", "head_dim"), _INIT_SCALE)
        self.value = _param(rngs, (D, K, C), ("embed", "kv_heads", "head_dim"), _INIT_SCALE)
        scale = _INIT_SCALE / (2 * config.layers) ** 0.5
        self.output = _param(rngs, (H, C, D), ("heads", "head_dim", "embed"), scale)

    def __call__(
        self, x_BTD: Array, angles: tuple[Array, Array], attend: Attend, cache: Any
    ) -> tuple[Array, Any, dict[str, Array]]:
        """What attention adds to the residual stream, the new cache, and the activations."""
        normed = rms_norm(x_BTD, self.norm[...], self.config.norm_eps)
        query = rotate(jnp.einsum("BTD,DHC->BTHC", normed, self.query[...]), angles)
        key = rotate(jnp.einsum("BTD,DKC->BTKC", normed, self.key[...]), angles)
        value = jnp.einsum("BTD,DKC->BTKC", normed, self.value[...])
        heads, cache = attend(query, key, value, cache)
        out = jnp.einsum("BTHC,HCD->BTD", heads, self.output[...])
        return out, cache, {"attention_input": normed, "heads": heads}


class Mlp(nnx.Module):
    """SwiGLU feed-forward network with its norm, without the residual (Shazeer 2020)."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.config = config
        D, F = config.embed, config.mlp
        self.norm = _norm_weight(config)
        self.gate = _param(rngs, (D, F), ("embed", "mlp"), _INIT_SCALE)
        self.up = _param(rngs, (D, F), ("embed", "mlp"), _INIT_SCALE)
        scale = _INIT_SCALE / (2 * config.layers) ** 0.5
        self.down = _param(rngs, (F, D), ("mlp", "embed"), scale)

    def __call__(self, x_BTD: Array) -> tuple[Array, dict[str, Array]]:
        """What the network adds to the residual stream, and the activations."""
        normed = rms_norm(x_BTD, self.norm[...], self.config.norm_eps)
        # One axis of tokens: given two, XLA on CPU turns the neurons' gradient around for the
        # weights', by computing it again.
        normed_ND = normed.reshape(-1, normed.shape[-1])
        neurons_NF = jax.nn.silu(normed_ND @ self.gate[...]) * (normed_ND @ self.up[...])
        neurons = neurons_NF.reshape(*normed.shape[:-1], -1)
        added = (neurons_NF @ self.down[...]).reshape(normed.shape)
        return added, {"mlp_input": normed, "neurons": neurons}


class Block(nnx.Module):
    """One layer."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.attention = Attention(config, rngs)
        self.mlp = Mlp(config, rngs)

    def __call__(
        self, x_BTD: Array, angles: tuple[Array, Array], attend: Attend, cache: Any
    ) -> tuple[Array, Any, dict[str, Array]]:
        """The residual stream after this layer, the new cache, and the activations."""
        with jax.named_scope("attention"):
            attended, cache, attention_activations = self.attention(x_BTD, angles, attend, cache)
            middle = x_BTD + attended
        with jax.named_scope("mlp"):
            added, mlp_activations = self.mlp(middle)
            out = middle + added
        activations = {"residual_in": x_BTD, "residual_out": out}
        return out, cache, {**activations, **attention_activations, **mlp_activations}


def block(config: LlamaConfig, params: Params) -> Block:
    """One layer as a module, for who wants to run `attention` and `mlp` apart.

    Args:
      config: the model's shape.
      params: the layer's slice of `params["layers"]`.
    """
    graph, abstract = _abstract_block(config)
    state = jax.tree.map(lambda x: x, abstract)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


@functools.lru_cache(maxsize=64)
def _abstract_block(config: LlamaConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Block(config, nnx.Rngs(0))))


class Llama(nnx.Module):
    """The whole network up to the final norm; the unembedding belongs to the loss.

    Layers are stacked: every parameter below `layers` has a leading "layers" axis and the forward
    pass scans over it, so that compile time does not grow with depth and cutting layers is a
    `take`.
    """

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.config = config
        V, D = config.vocab_size, config.embed
        self.embedding = _param(rngs, (V, D), ("vocab", "embed"), _INIT_SCALE)

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs)

        self.layers = stack(rngs)
        self.final_norm = _norm_weight(config)
        if not config.tied:
            self.unembedding = _param(rngs, (D, V), ("embed", "vocab"), _INIT_SCALE)

    def __call__(
        self,
        tokens_BT: Array,
        positions_BT: Array,
        attend: Attend,
        cache: Any = None,
        *,
        remat: Remat = "none",
        observe: Callable[[dict[str, Array]], Any] | None = None,
        reading: Reading = Reading(),
    ) -> tuple[Array, Any, Any]:
        """Final hidden states [B, T, D], the new cache, and what `observe` made of each layer."""
        block, stacked = nnx.split(self.layers)
        angles = rotary_angles(self.config, positions_BT)

        def step(x: Array, layer: tuple[nnx.State, Any]) -> tuple[Array, tuple[Any, Any]]:
            weights, layer_cache = layer
            if reading.layer is not None:
                read = reading.layer(nnx.to_pure_dict(weights))
                nnx.replace_by_pure_dict(weights, checkpoint_name(read, _AS_READ))
            x, layer_cache, activations = nnx.merge(block, weights)(x, angles, attend, layer_cache)
            return x, (layer_cache, observe(activations) if observe else None)

        if remat != "none" or reading.layer is not None:
            step = jax.checkpoint(step, policy=_KEPT[remat])
        with jax.named_scope("embedding"):
            x = reading.lookup(self.embedding[...], tokens_BT)
        x, (cache, observed) = jax.lax.scan(step, x, (stacked, cache))
        norm_D = reading.norm(self.final_norm[...])
        return rms_norm(x, norm_D, self.config.norm_eps), cache, observed


_ATTENDED = jax.checkpoint_policies.save_only_these_names(ATTENDED)


def _all_but_read(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """Keeps everything but parameters that were made whole, in either of their names."""
    return primitive.name != "all_gather" and parameters.get("name") != _AS_READ


_KEPT: dict[Remat, Any] = {
    "none": _all_but_read,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims, _ATTENDED
    ),
    "attention": _ATTENDED,
    "full": None,
}
"""What of a layer is kept for the backward pass."""


@functools.lru_cache(maxsize=64)
def _abstract(config: LlamaConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0))))


def merge(config: LlamaConfig, params: Params) -> Llama:
    """The module that holds `params`; the one place where a tree becomes a module."""
    graph, abstract = _abstract(config)
    state = jax.tree.map(lambda x: x, abstract)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def init_params(config: LlamaConfig, key: Array, dtype: jnp.dtype = jnp.float32) -> Params:
    """Random parameters: normal of scale 0.02, outputs divided by sqrt(2 L) (GPT-2)."""
    model = Llama(config, nnx.Rngs(params=key))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return jax.tree.map(lambda x: x.astype(dtype), params)


def abstract_params(config: LlamaConfig, dtype: jnp.dtype = jnp.float32) -> Params:
    """The tree of `init_params` as `jax.ShapeDtypeStruct`s; allocates nothing."""
    _, state = _abstract(config)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), nnx.to_pure_dict(state))


def logical_axes(config: LlamaConfig) -> Params:
    """The tree of `init_params` with each array's tuple of logical axis names in its place."""
    _, state = _abstract(config)
    axes: Params = {}
    for path, variable in nnx.to_flat_state(state):
        names = [str(name) for name in path]
        node = axes
        for name in names[:-1]:
            node = node.setdefault(name, {})
        stacked = ("layers",) if names[0] == "layers" else ()
        node[names[-1]] = stacked + tuple(variable.get_metadata("axes"))
    return axes


def hidden_states(
    config: LlamaConfig,
    params: Params,
    tokens_BT: Array,
    segment_ids_BT: Array | None = None,
    *,
    remat: Remat = "none",
    observe: Callable[[dict[str, Array]], Any] | None = None,
    reading: Reading = Reading(),
    times: Times | None = None,
    rows: jax.sharding.Sharding | None = None,
) -> Any:
    """Final hidden states [B, T, D], after the last norm.

    Args:
      config: the model's shape.
      params: its parameters.
      tokens_BT: token ids.
      segment_ids_BT: which packed document a token belongs to; 0 marks padding. Attention stays
        inside a segment and positions restart with it. None: each row is one document.
      remat: what the backward pass recomputes: a `Remat`.
      observe: a function of one layer's activations, a dict of residual_in [B,T,D],
        attention_input [B,T,D], heads [B,T,H,C], mlp_input [B,T,D], neurons [B,T,F] and
        residual_out [B,T,D].
      reading: how devices that hold shares of the parameters come by what they compute with.
      times: those of a device, where several share rows: tokens and segments are of all times,
        everything else, also what is returned, of the device's own.
      rows: the sharding of a batch, if it lies on a mesh whose work the compiler splits: it cannot
        split attention well by itself.

    Returns:
      hidden_BTD; with `observe`, (hidden_BTD, its results stacked over layers).
    """
    if segment_ids_BT is None:
        segment_ids_BT = jnp.ones_like(tokens_BT)
    read_BT = tokens_BT, segment_positions(segment_ids_BT)
    tokens_BT, positions_BT = times.own(read_BT) if times else read_BT
    hidden, _, observed = merge(config, params)(
        tokens_BT,
        positions_BT,
        segment_attention(segment_ids_BT, times, rows),
        remat=remat,
        observe=observe,
        reading=reading,
    )
    return (hidden, observed) if observe else hidden


def unembedding(params: Params) -> Array:
    """The matrix [D, V] that turns hidden states into logits."""
    return params["unembedding"] if "unembedding" in params else params["embedding"].T


def logits(
    config: LlamaConfig, params: Params, tokens_BT: Array, segment_ids_BT: Array | None = None
) -> Array:
    """Next-token logits [B, T, V] in float32."""
    hidden = hidden_states(config, params, tokens_BT, segment_ids_BT)
    return jnp.einsum(
        "BTD,DV->BTV", hidden, unembedding(params), preferred_element_type=jnp.float32
    )
