"""Causal attention inside of packed segments: splash attention on TPU, XLA's elsewhere.

Dimensions: B batch, T time, H query heads, K kv heads, C head_dim.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jax.sharding import PartitionSpec

Attend = Callable[[Array, Array, Array, Any], tuple[Array, Any]]
"""(query_BTHC, key_BTKC, value_BTKC, cache of this layer) -> (heads_BTHC, cache of this layer)."""

ATTENDED = "attended"
"""What attention gives, where a choice is made of what is kept for the backward pass."""

_TILE = 128  # what lengths must be multiples of for the kernel
_MOST_TILES = 16  # each is compiled
_BLOCK = 1024  # twice as much does not fit a v5e's vector memory


def segment_attention(segment_ids_BT: Array) -> Attend:
    """Causal attention that stays inside a segment; uses no cache.

    On a TPU it is splash attention (JAX's kernel of FlashAttention, Dao et al. 2022, that skips
    blocks above the diagonal) where every device works on rows of its own, or is alone: the
    compiler cannot split kernels. Elsewhere, and for lengths that are no multiples of 128, it is
    `jax.nn.dot_product_attention` on tiles of queries.
    """
    time = segment_ids_BT.shape[1]
    if _kernels() and time % _TILE == 0:
        return functools.partial(_splash, segment_ids_BT)
    return functools.partial(_in_tiles, segment_ids_BT)


def _in_tiles(
    segment_ids_BT: Array, query: Array, key: Array, value: Array, cache: Any
) -> tuple[Array, Any]:
    """XLA's attention, some queries at a time with no key behind the last of them."""
    time = segment_ids_BT.shape[1]
    size = _TILE * math.ceil(time / (_TILE * _MOST_TILES))
    tiles = []
    for first in range(0, time, size):
        last = min(first + size, time)
        same = segment_ids_BT[:, None, first:last, None] == segment_ids_BT[:, None, None, :last]
        mask_B1tT = same & jnp.tri(last - first, last, first, dtype=bool)
        seen = key[:, :last], value[:, :last]
        tiles.append(jax.nn.dot_product_attention(query[:, first:last], *seen, mask=mask_B1tT))
    heads = jnp.concatenate(tiles, axis=1) if len(tiles) > 1 else tiles[0]
    return checkpoint_name(heads, ATTENDED), cache


def _kernels() -> bool:
    """Whether this is traced for a TPU, by code that sees what one device sees."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.default_backend() == "tpu" and jax.device_count() == 1
    device = mesh.abstract_device
    alone = bool(mesh.manual_axes) or mesh.size == 1
    return device is not None and device.platform == "tpu" and alone


def _splash(
    segment_ids_BT: Array, query: Array, key: Array, value: Array, cache: Any
) -> tuple[Array, Any]:
    def kernel(query: Array, key: Array, value: Array, segment_ids_BT: Array) -> Array:
        ids = splash.SegmentIds(segment_ids_BT, segment_ids_BT)
        return jax.vmap(_kernel(*query.shape[1:3]))(query, key, value, ids)

    attend: Callable[..., Array] = kernel
    mesh = jax.sharding.get_abstract_mesh()
    if axes := tuple(name for name in mesh.axis_names if name not in mesh.manual_axes):
        shards = math.prod(mesh.shape[name] for name in axes)
        divides = query.shape[2] % shards == key.shape[2] % shards == 0
        spec = PartitionSpec(None, axes if divides else None)
        attend = jax.shard_map(
            kernel,
            in_specs=(spec, spec, spec, PartitionSpec()),
            out_specs=spec,
            axis_names=set(axes),
            check_vma=False,
        )
    query = query * query.shape[-1] ** -0.5
    heads = attend(*(x.swapaxes(1, 2) for x in (query, key, value)), segment_ids_BT)
    return heads.swapaxes(1, 2), cache


def _kernel(heads: int, time: int) -> Any:
    block = next(b for b in range(min(_BLOCK, time), 0, -_TILE) if time % b == 0)
    # With time along the lanes heads of 64 channels waste none, and rotary halves lie in tiles.
    minor = splash.QKVLayout.SEQ_MINOR
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
        q_layout=minor,
        k_layout=minor,
        v_layout=minor,
    )
    mask = splash.MultiHeadMask([splash.CausalMask((time, time))] * heads)
    return splash.make_splash_mha(
        mask,
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENDED,
    )
