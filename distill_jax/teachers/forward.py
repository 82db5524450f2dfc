"""What a teacher says about rows of a corpus: one forward pass, reduced on the device."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distill_jax import data, models, parallel
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

    Logits exist for `chunk_tokens` tokens at a time. `labels_BT` are those of `labels`, `seeds`,
    uint32 [B, 2], those of `sampling.row_seeds`.

    Returns:
      Each scheme's arrays, [B, T] or [B, T, width].
    """
    hidden_BTD = hidden_states(config, params, tokens_BT, segment_ids_BT)
    unembedding_DV = models.unembedding(params)
    batch, time = tokens_BT.shape
    # Chunks cut time, not rows, so that rows spread over devices stay spread.
    step = _largest_divisor(time, max(1, chunk_tokens // batch))
    encode = _encoder(schemes, temperature, sharding, unembedding_DV.shape[-1])

    def encode_chunk(chunk: tuple[jax.Array, ...]) -> tuple[dict[str, jax.Array], ...]:
        hidden, labels, positions = chunk
        logits_BTV = jnp.einsum(
            "BTD,DV->BTV", hidden, unembedding_DV, preferred_element_type=jnp.float32
        )
        return encode(logits_BTV, labels, seeds, positions)

    def chunks(values: jax.Array) -> jax.Array:
        return jnp.moveaxis(values.reshape(batch, time // step, step, *values.shape[2:]), 1, 0)

    positions = jnp.arange(time).reshape(-1, step)
    with jax.named_scope("head"):
        encoded = jax.lax.map(encode_chunk, (chunks(hidden_BTD), chunks(labels_BT), positions))
    encoded = jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, time, *x.shape[3:]), encoded
    )
    # Each process reads the rows that it fed.
    return encoded if sharding is None else jax.lax.with_sharding_constraint(encoded, sharding)


def labels(tokens: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
    """The next token of each position's segment, -1 where there is none; int32 [..., T]."""
    following, where = data.next_token_labels(tokens, segment_ids)
    return np.where(where, following, -1)


def _encoder(
    schemes: tuple[Scheme, ...], temperature: float, sharding: NamedSharding | None, vocab: int
) -> Callable[..., tuple[dict[str, jax.Array], ...]]:
    """(logits_BTV, labels_BT, seeds, positions_T) -> every scheme's arrays, [B, T, ...]."""

    def encode(
        logits_BTV: jax.Array, labels_BT: jax.Array, seeds: jax.Array, positions_T: jax.Array
    ) -> tuple[dict[str, jax.Array], ...]:
        logits_NV = logits_BTV.reshape(-1, logits_BTV.shape[-1])
        keys_N = jax.vmap(sampling.token_keys, (0, None))(seeds, positions_T).reshape(-1)
        encoded = tuple(
            scheme.encode(logits_NV, labels_BT.reshape(-1), keys_N, temperature, axis)
            for scheme in schemes
        )
        return jax.tree.map(lambda x: x.reshape(*labels_BT.shape, *x.shape[1:]), encoded)

    axis = None
    if sharding is None:
        return encode
    tensor = parallel.RULES["vocab"]
    shards = sharding.mesh.shape.get(tensor, 1)
    # Left to the compiler, logits that are split over the vocabulary would be gathered.
    axis = tensor if shards > 1 and vocab % shards == 0 else None
    rows = P(*sharding.spec)
    return jax.shard_map(
        encode,
        mesh=sharding.mesh,
        in_specs=(P(*rows, None, axis), rows, rows, P()),
        out_specs=rows,
    )


def _largest_divisor(number: int, at_most: int) -> int:
    return next(d for d in range(min(number, at_most), 0, -1) if number % d == 0)
