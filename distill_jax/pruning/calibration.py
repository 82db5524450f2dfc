"""Calibration rows: which they are, and how well a model predicts them.

Dimensions: B rows, T time, L layers, D embed.
"""

import functools
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from distill_jax import data, losses, models
from distill_jax.artifacts import InputError
from distill_jax.pruning.activations import Batch, padded


class Rows:
    """Batches, checked against a vocabulary and hashed row by row as they pass by.

    The fingerprint does not depend on how rows are split into batches. It is that of the rows
    that have passed: empty before the first.

    Raises (while it is read):
      InputError: a token's id is not in the vocabulary: the rows are another tokenizer's.
    """

    def __init__(self, batches: Iterable[Batch], vocab_size: int):
        self._batches, self._vocab_size = batches, vocab_size
        self._hash = hashlib.sha256()
        self._any = False

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            tokens = np.asarray(batch["tokens"], np.int32)
            segments = np.asarray(batch.get("segment_ids", np.ones_like(tokens)), np.int32)
            real = tokens[segments > 0]
            if real.size and not 0 <= real.min() <= real.max() < self._vocab_size:
                wrong = real.min() if real.min() < 0 else real.max()
                raise InputError(
                    f"calibration rows hold the token id {wrong}, the model's vocabulary has "
                    f"{self._vocab_size}: they were made by another tokenizer"
                )
            self._hash.update(np.concatenate((tokens, segments), axis=1).tobytes())
            self._any = True
            yield {"tokens": tokens, "segment_ids": segments}

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits."""
        return self._hash.hexdigest()[:16] if self._any else ""


def rows_fingerprint(batches: Iterable[Batch], vocab_size: int) -> str:
    """The fingerprint of all rows.

    Raises:
      InputError: a token's id is not in the vocabulary.
    """
    rows = Rows(batches, vocab_size)
    for _ in rows:
        pass
    return rows.fingerprint


def labelled(batch: Batch, sharding: jax.sharding.Sharding | None) -> dict[str, Array]:
    """A batch's "tokens", "segment_ids", and the "labels" and "where" of next tokens, on devices.

    Each is [B, T].
    """
    tokens, segments = padded(batch, sharding)
    labels, where = data.next_token_labels(tokens, segments)
    found = {"tokens": tokens, "segment_ids": segments, "labels": labels, "where": where}
    return jax.device_put(found, sharding)


def head_loss(
    config: models.LlamaConfig,
    params: models.Params,
    hidden_BTD: Array,
    batch: dict[str, Array],
) -> losses.Totals:
    """Summed cross-entropy in nats of the next tokens, and how many there are.

    Differentiable; logits exist for a chunk of tokens at a time.

    Args:
      config: the model's shape.
      params: its parameters.
      hidden_BTD: its final hidden states.
      batch: of `labelled`.
    """
    return losses.fused_linear(
        losses.hard_labels(),
        hidden_BTD.reshape(-1, config.embed),
        params["embedding" if config.tied else "unembedding"],
        {"labels": batch["labels"].reshape(-1)},
        batch["where"].reshape(-1),
        transposed=config.tied,
    )


@functools.partial(jax.jit, static_argnums=0)
def batch_loss(
    config: models.LlamaConfig, params: models.Params, batch: dict[str, Array]
) -> losses.Totals:
    """`head_loss` of a model that reads the batch."""
    hidden = models.hidden_states(config, params, batch["tokens"], batch["segment_ids"])
    return head_loss(config, params, hidden, batch)


def without_layers(params: models.Params, kept_L: Array) -> models.Params:
    """Parameters of the same shape, in which only the layers kept add to the residual stream."""
    layers = params["layers"]

    def silenced(weight: Array) -> Array:
        return jnp.where(kept_L.reshape(-1, *(1,) * (weight.ndim - 1)), weight, 0)

    return params | {
        "layers": {
            "attention": layers["attention"] | {"output": silenced(layers["attention"]["output"])},
            "mlp": layers["mlp"] | {"down": silenced(layers["mlp"]["down"])},
        }
    }


def removal_losses(
    model: models.Model,
    batches: Iterable[Batch],
    *,
    batch_sharding: jax.sharding.Sharding | None = None,
) -> np.ndarray:
    """Mean cross-entropy [L] in nats of the next tokens when one layer is left out.

    Its exponential is the perplexity by which Kim et al. (Shortened LLaMA, 2024) and Song et al.
    (SLEB, 2024) rank layers: that whose removal does least harm goes first. One forward pass a
    layer and batch, compiled once, since the layer's number is data.

    Raises:
      InputError: the batches hold no token to predict.
    """
    sums, tokens = np.zeros(model.config.layers), 0.0
    for batch in batches:
        placed = labelled(batch, batch_sharding)
        found = [
            _loss_without(model.params, placed, layer, config=model.config)
            for layer in range(model.config.layers)
        ]
        sums += [float(loss) for loss, _ in found]
        tokens += float(found[0][1])
    if not tokens:
        raise InputError("the calibration batches hold no token to predict")
    return (sums / tokens).astype(np.float32)


@functools.partial(jax.jit, static_argnames="config")
def _loss_without(
    params: models.Params, batch: dict[str, Array], layer: Any, *, config: models.LlamaConfig
) -> tuple[Array, Array]:
    kept_L = jnp.arange(config.layers) != layer
    totals = batch_loss(config, without_layers(params, kept_L), batch)
    return totals.loss, totals.weight
