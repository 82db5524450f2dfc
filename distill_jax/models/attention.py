"""Causal attention inside of packed segments: splash attention on TPU, XLA's elsewhere.

Dimensions: B batch, T time, t times of a device, H query heads, K kv heads, C head_dim.
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
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, Sharding

from distill_jax.models.times import Times

Attend = Callable[[Array, Array, Array, Any], tuple[Array, Any]]
"""(query_BTHC, key_BTKC, value_BTKC, cache of this layer) -> (heads_BTHC, cache of this layer)."""

ATTENDED = "attended"
"""What attention gives, where a choice is made of what is kept for the backward pass."""

_TILE = 128  # what lengths must be multiples of for the kernel
_MOST_TILES = 16  # each is compiled
_BLOCK = 1024  # twice as much does not fit a v5e's vector memory


def segment_attention(
    segment_ids_BT: Array, times: Times | None = None, rows: Sharding | None = None
) -> Attend:
    """Causal attention that stays inside a segment; uses no cache.

    With `times` queries, keys and values are those of a device's times, segments those of all.
    With `rows` on a mesh, the sharding of a batch, every device attends in rows of its own, though
    the compiler splits all else.

    On a TPU it is splash attention (JAX's kernel of FlashAttention, Dao et al. 2022, that skips
    blocks above the diagonal) where every device works on rows of its own, or is alone: the
    compiler cannot split kernels. Elsewhere, and for lengths that are no multiples of 128, it is
    `jax.nn.dot_product_attention` on tiles of queries.
    """
    if isinstance(rows, NamedSharding):
        return functools.partial(_on_own_rows, segment_ids_BT, rows)
    piece = segment_ids_BT.shape[1] // (2 * times.shards if times else 1)
    attend = _splash if _kernels() and piece % _TILE == 0 else _in_tiles
    return functools.partial(attend, segment_ids_BT, times)


def _on_own_rows(
    segment_ids_BT: Array, rows: NamedSharding, query: Array, key: Array, value: Array, cache: Any
) -> tuple[Array, Any]:
    def attend(segment_ids_BT: Array, query: Array, key: Array, value: Array) -> Array:
        return segment_attention(segment_ids_BT)(query, key, value, None)[0]

    spec = PartitionSpec(*rows.spec[:1])
    names = spec[0] if len(spec) else None
    own = jax.shard_map(
        attend,
        mesh=rows.mesh,
        in_specs=spec,
        out_specs=spec,
        axis_names={names} if isinstance(names, str) else set(names or ()),
        check_vma=False,
    )
    return own(segment_ids_BT, query, key, value), cache


def _in_tiles(
    segment_ids_BT: Array, times: Times | None, query: Array, key: Array, value: Array, cache: Any
) -> tuple[Array, Any]:
    """XLA's attention, some queries at a time with no key behind the last of them.

    Where devices share rows, what is behind them differs: keys there are masked alone.
    """
    key_times = jnp.arange(segment_ids_BT.shape[1])[None]
    query_times, query_ids, key, value = _shared(times, key_times, segment_ids_BT, key, value)
    time = query.shape[1]
    size = _TILE * math.ceil(time / (_TILE * _MOST_TILES))
    tiles = []
    for first in range(0, time, size):
        tile = slice(first, min(first + size, time))
        seen = slice(None if times else tile.stop)
        same = query_ids[:, tile, None] == segment_ids_BT[:, None, seen]
        before = query_times[:, tile, None] >= key_times[:, None, seen]
        mask_B1tT = (same & before)[:, None]
        tiles.append(
            jax.nn.dot_product_attention(
                query[:, tile], key[:, seen], value[:, seen], mask=mask_B1tT
            )
        )
    heads = jnp.concatenate(tiles, axis=1) if len(tiles) > 1 else tiles[0]
    return checkpoint_name(heads, ATTENDED), cache


def _shared(
    times: Times | None, key_times: Array, segment_ids_BT: Array, key: Array, value: Array
) -> tuple[Array, Array, Array, Array]:
    """Times and segments of the queries that are here, and keys and values of all times."""
    if times is None:
        return key_times, segment_ids_BT, key, value
    return *times.own((key_times, segment_ids_BT)), times.whole(key), times.whole(value)


def _kernels() -> bool:
    """Whether this is traced for a TPU, by code that sees what one device sees."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.default_backend() == "tpu" and jax.device_count() == 1
    device = mesh.abstract_device
    alone = bool(mesh.manual_axes) or mesh.size == 1
    return device is not None and device.platform == "tpu" and alone


def _splash(
    segment_ids_BT: Array, times: Times | None, query: Array, key: Array, value: Array, cache: Any
) -> tuple[Array, Any]:
    def kernel(query: Array, key: Array, value: Array, ids: Any, device: Any) -> Array:
        attend = _kernel(query.shape[1], key.shape[2], times, device)
        return jax.vmap(attend)(query, key, value, ids)

    attend: Callable[..., Array] = kernel
    mesh = jax.sharding.get_abstract_mesh()
    if axes := tuple(name for name in mesh.axis_names if name not in mesh.manual_axes):
        shards = math.prod(mesh.shape[name] for name in axes)
        divides = query.shape[2] % shards == key.shape[2] % shards == 0
        spec = PartitionSpec(None, axes if divides else None)
        attend = jax.shard_map(
            kernel,
            in_specs=(spec, spec, spec, PartitionSpec(), PartitionSpec()),
            out_specs=spec,
            axis_names=set(axes),
            check_vma=False,
        )
    query = query * query.shape[-1] ** -0.5
    query_ids, device = segment_ids_BT, None
    if times:
        query_ids, device = times.own(segment_ids_BT), times.device()
        key, value = times.whole(key), times.whole(value)
    ids = splash.SegmentIds(query_ids, segment_ids_BT)
    heads = attend(*(x.swapaxes(1, 2) for x in (query, key, value)), ids, device)
    return heads.swapaxes(1, 2), cache


def _kernel(heads: int, time: int, times: Times | None, device: Any) -> Any:
    """The kernel of rows of `time`; with `times` that of a device's queries, by its number."""
    piece = time // (2 * times.shards) if times else time
    block = next(b for b in range(min(_BLOCK, piece), 0, -_TILE) if piece % b == 0)
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
    mask = splash.CausalMask((time, time))
    if times:
        mask.q_sequence = times.order(time)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=times.shards if times else 1,
        residual_checkpoint_name=ATTENDED,
    )
    return _of_device(kernel, times, device) if times else kernel


def _of_device(kernel: Any, times: Times, device: Any) -> Any:
    """The kernel with one device's share of what it knows of the mask."""
    mesh = AbstractMesh((times.shards,), (times.axis,))
    specs = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, times.axis)))

    def share(known: Any, spec: PartitionSpec) -> Array:
        for axis, name in enumerate(spec):
            if name == times.axis:
                size = known.shape[axis] // times.shards
                known = jax.lax.dynamic_slice_in_dim(known, device * size, size, axis)
        return known

    return jax.tree.map(share, kernel, specs)
