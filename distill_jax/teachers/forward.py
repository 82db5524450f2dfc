"""What a teacher says about rows of a corpus: one forward pass, reduced on the device."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distill_jax import data, models, parallel
from distill_jax.models.times import Times
from distill_jax.teachers import sampling
from distill_jax.teachers.schemes import Scheme

HiddenStates = Callable[..., jax.Array]
"""(config, params, tokens_BT, segment_ids_BT) -> hidden_BTD, as `models.hidden_states`."""


@functools.partial(
    jax.jit,
    static_argnames=(
        "config", "schemes", "temperature", "chunk_tokens", "hidden_states", "sharding"
    ),
)  # fmt: skip
def ask_teacher(
    params: models.Params,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array,
    labels_BT: jax.Array,
    seeds: jax.Array,
    *,
    config: models.LlamaConfig,
    schemes: tuple[Scheme, ...],
    temperature: float,
    chunk_tokens: int,
    hidden_states: HiddenStates = models.hidden_states,
    sharding: NamedSharding | None = None,
) -> tuple[dict[str, jax.Array], ...]:
    """One forward pass of a teacher, and what every scheme keeps of it.

    Logits exist for `chunk_tokens` tokens at a time. With a `sharding` of rows every device works
    on rows of its own and makes a layer's parameters whole when it needs them; devices among which
    it does not split rows, along `parallel.TIME_AXIS`, have a part of their times each.
    `labels_BT` are those of `labels`, `seeds`, uint32 [B, 2], those of `sampling.row_seeds`.

    Returns:
      Each scheme's arrays, [B, T] or [B, T, width].
    """
    ask = functools.partial(
        _ask,
        config=config,
        encode=functools.partial(_encode, schemes, temperature),
        chunk_tokens=chunk_tokens,
        hidden_states=hidden_states,
    )
    batch = (tokens_BT, segment_ids_BT, labels_BT, seeds)
    if sharding is None:
        return ask(params, *batch)
    mesh: Any = sharding.mesh
    (tensor,) = parallel.RULES["vocab"]
    shards = mesh.shape.get(tensor, 1)
    if shards > 1 and config.vocab_size % shards == 0:
        ask = functools.partial(ask, vocabulary=tensor)
    if hidden_states is models.hidden_states:
        shares = parallel.Shares(mesh, models.logical_axes(config), params)
        times = times_of(sharding)
        ask = functools.partial(ask, reading=models.Reading.of(shares), times=times)
        return parallel.map_rows(ask, shares, split_time=times is not None)(params, *batch)
    rows = P(*sharding.spec)
    return jax.shard_map(  # another forward pass reads parameters whole
        ask,
        mesh=mesh,
        in_specs=(P(), rows, rows, rows, rows),
        out_specs=rows,
        axis_names=frozenset(parallel.row_axes(mesh)),
        check_vma=False,
    )(params, *batch)


def _ask(
    params: models.Params,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array,
    labels_BT: jax.Array,
    seeds: jax.Array,
    *,
    config: models.LlamaConfig,
    encode: Callable[..., tuple[dict[str, jax.Array], ...]],
    chunk_tokens: int,
    hidden_states: HiddenStates,
    reading: models.Reading | None = None,
    times: Times | None = None,
    vocabulary: str | None = None,
) -> tuple[dict[str, jax.Array], ...]:
    """`ask_teacher` of one device's rows."""
    how = {} if reading is None else {"reading": reading, "times": times}
    hidden_BTD = hidden_states(config, params, tokens_BT, segment_ids_BT, **how)
    unembedding_DV = (reading or models.Reading()).unembedding(params)
    positions_1T = jnp.arange(tokens_BT.shape[1])[None]
    if times:
        labels_BT, positions_1T = times.own((labels_BT, positions_1T))
    batch, time = labels_BT.shape
    step = _largest_divisor(time, max(1, chunk_tokens // batch))
    if vocabulary is not None:
        # Left to the compiler, logits that are split over the vocabulary would be gathered.
        encode = jax.shard_map(
            functools.partial(encode, axis=vocabulary),
            in_specs=(P(None, None, vocabulary), P(), P(), P()),
            out_specs=P(),
            axis_names={vocabulary},
            check_vma=False,
        )

    def encode_chunk(chunk: tuple[jax.Array, ...]) -> tuple[dict[str, jax.Array], ...]:
        hidden, labels, positions = chunk
        logits_BTV = jnp.einsum(
            "BTD,DV->BTV", hidden, unembedding_DV, preferred_element_type=jnp.float32
        )
        return encode(logits_BTV, labels, seeds, positions)

    def chunks(values: jax.Array) -> jax.Array:
        return jnp.moveaxis(values.reshape(batch, time // step, step, *values.shape[2:]), 1, 0)

    positions = positions_1T.reshape(-1, step)
    with jax.named_scope("head"):
        encoded = jax.lax.map(encode_chunk, (chunks(hidden_BTD), chunks(labels_BT), positions))

    def rows(values: jax.Array) -> jax.Array:
        own = jnp.moveaxis(values, 0, 1).reshape(batch, time, *values.shape[3:])
        return times.whole(own) if times else own

    return jax.tree.map(rows, encoded)


def times_of(sharding: NamedSharding | None) -> Times | None:
    """How devices share rows that lie so; None: each has rows of its own."""
    if sharding is None:
        return None
    mesh: Any = sharding.mesh
    shards = parallel.time_shards(mesh)
    if shards == 1 or parallel.TIME_AXIS in parallel.names_of(next(iter(sharding.spec), None)):
        return None
    return Times(parallel.TIME_AXIS, shards)


def labels(tokens: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
    """The next token of each position's segment, -1 where there is none; int32 [..., T]."""
    following, where = data.next_token_labels(tokens, segment_ids)
    return np.where(where, following, -1)


def _encode(
    schemes: tuple[Scheme, ...],
    temperature: float,
    logits_BTV: jax.Array,
    labels_BT: jax.Array,
    seeds: jax.Array,
    positions_T: jax.Array,
    *,
    axis: str | None = None,
) -> tuple[dict[str, jax.Array], ...]:
    """Every scheme's arrays, [B, T, ...]; `axis` is the one over which the vocabulary is split."""
    logits_NV = logits_BTV.reshape(-1, logits_BTV.shape[-1])
    keys_N = jax.vmap(sampling.token_keys, (0, None))(seeds, positions_T).reshape(-1)
    encoded = tuple(
        scheme.encode(logits_NV, labels_BT.reshape(-1), keys_N, temperature, axis)
        for scheme in schemes
    )
    return jax.tree.map(lambda x: x.reshape(*labels_BT.shape, *x.shape[1:]), encoded)


def _largest_divisor(number: int, at_most: int) -> int:
    return next(d for d in range(min(number, at_most), 0, -1) if number % d == 0)
