"""Log-probabilities of whole sequences, without the logits of all their tokens at once."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from distill_jax import losses
from distill_jax.models import LlamaConfig, Reading, hidden_states
from distill_jax.models.llama import Remat


def label_log_probs(
    hidden_ND: Array, unembedding_DV: Array, labels_N: Array, *, chunk: int = 1024
) -> Array:
    """log p(label) of each token, [N] float32, from logits of `chunk` tokens at a time.

    The backward pass recomputes a chunk's logits, so it needs no more than the forward pass. The
    gradient of the unembedding is summed over chunks in float32.
    """
    tokens = hidden_ND.shape[0]
    chunk = min(chunk, tokens)
    padding = -tokens % chunk
    hidden_ND = jnp.pad(hidden_ND, ((0, padding), (0, 0)))
    labels_N = jnp.pad(labels_N, (0, padding))
    wide_DV = unembedding_DV.astype(jnp.float32)

    @jax.checkpoint
    def of_chunk(arguments: tuple[Array, Array]) -> Array:
        hidden, labels = arguments
        logits = jnp.einsum(
            "ND,DV->NV",
            hidden,
            wide_DV.astype(unembedding_DV.dtype),
            preferred_element_type=jnp.float32,
        )
        return losses.token_log_probs(logits, labels)

    chunks = (hidden_ND.reshape(-1, chunk, hidden_ND.shape[1]), labels_N.reshape(-1, chunk))
    return jax.lax.map(of_chunk, chunks).reshape(-1)[:tokens]


def row_log_probs(
    config: LlamaConfig,
    params: Any,
    row: Mapping[str, Array],
    *,
    chunk: int = 1024,
    remat: Remat = "none",
    reading: Reading = Reading(),
) -> Array:
    """log p(label) of the tokens of each row where `row["where"]`, and 0, [B, T] float32.

    Args:
      config: the model's shape.
      params: its parameters.
      row: "tokens", "segment_ids", "labels" and "where", each [B, T].
      chunk: tokens whose logits are held at a time.
      remat: what the backward pass recomputes inside a layer.
      reading: how devices that hold shares of the parameters come by what they compute with.
    """
    hidden_BTD = hidden_states(
        config, params, row["tokens"], row["segment_ids"], remat=remat, reading=reading
    )
    hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    with jax.named_scope("head"):
        log_probs_N = label_log_probs(
            hidden_ND, reading.unembedding(params), row["labels"].reshape(-1), chunk=chunk
        )
    log_probs_BT = log_probs_N.reshape(row["labels"].shape)
    return jnp.where(row["where"], log_probs_BT, 0.0)


def sequence_log_probs(
    config: LlamaConfig,
    params: Any,
    row: Mapping[str, Array],
    *,
    chunk: int = 1024,
    remat: Remat = "none",
    reading: Reading = Reading(),
) -> Array:
    """Sums of `row_log_probs`, with its arguments, over each row, [B] float32."""
    log_probs_BT = row_log_probs(config, params, row, chunk=chunk, remat=remat, reading=reading)
    return jnp.sum(log_probs_BT, axis=-1)
