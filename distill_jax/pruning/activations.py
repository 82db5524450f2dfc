"""Activation scores: each row's tokens become a row of scores, and rows stream into moments.

Dimensions: B rows, T time, L layers, H query heads, K kv heads, G = H / K, C head_dim, F mlp,
D embed.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from distill_jax import models
from distill_jax.artifacts import InputError

Aggregation = Literal["mean", "l2", "variance"]
"""How scores are summed up over tokens, or over rows (Minitron 2024, 2.2)."""

Batch = Mapping[str, Any]
"""What calibration reads: "tokens" [B, T] and, where rows are packed, "segment_ids" [B, T]."""


def tokens_and_segments(
    batch: Batch, sharding: jax.sharding.Sharding | None
) -> tuple[Array, Array]:
    """A batch's token ids and segment ids (ones where it has none), placed on devices."""
    tokens = np.asarray(batch["tokens"], np.int32)
    segments = np.asarray(batch.get("segment_ids", np.ones_like(tokens)), np.int32)
    return jax.device_put(tokens, sharding), jax.device_put(segments, sharding)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and summed squared deviation of a stream of rows (Chan, Golub & LeVeque 1983).

    Unlike sums of squares it keeps its precision when the variance is far below the mean.
    """

    count: Array
    mean: Array
    deviation: Array

    @classmethod
    def zeros(cls, shape: tuple[int, ...]) -> "Moments":
        """Of no rows."""
        return cls(jnp.zeros(()), jnp.zeros(shape), jnp.zeros(shape))

    def add(self, rows: Array, weight_B: Array) -> "Moments":
        """With a batch more: rows [..., B, n] of weight 0 or 1."""
        weight = weight_B[:, None]
        new = jnp.sum(weight_B)
        mean = jnp.sum(rows * weight, axis=-2) / jnp.maximum(new, 1)
        deviation = jnp.sum(jnp.square(rows - mean[..., None, :]) * weight, axis=-2)
        count = self.count + new
        share = new / jnp.maximum(count, 1)
        shift = mean - self.mean
        return Moments(
            count,
            self.mean + shift * share,
            self.deviation + deviation + jnp.square(shift) * self.count * share,
        )

    def aggregate(self, how: Aggregation) -> Array:
        """The rows' mean, L2 norm or variance. Rows' scores are never negative."""
        if how == "mean":
            return self.mean
        if how == "variance":
            return self.deviation / self.count
        return jnp.sqrt(self.deviation + self.count * jnp.square(self.mean))


def _over_sequence(x_BTn: Array, where_BT: Array, how: Aggregation) -> Array:
    """One score [B, n] from each row's real tokens."""
    x = x_BTn.astype(jnp.float32)
    where = where_BT[..., None]
    count = jnp.maximum(jnp.sum(where, axis=1), 1)
    if how == "mean":
        return jnp.sum(jnp.abs(x), axis=1, where=where) / count
    if how == "l2":
        return jnp.sqrt(jnp.sum(jnp.square(x), axis=1, where=where))
    mean = jnp.sum(x, axis=1, where=where) / count
    return jnp.sum(jnp.square(x - mean[:, None]), axis=1, where=where) / count


def _observe(
    layer: dict[str, Array], where_BT: Array, kv_heads: int, how: Aggregation
) -> dict[str, Array]:
    """One layer's contribution of one batch: row scores [B, n], and sums over tokens."""
    layer = {name: value.astype(jnp.float32) for name, value in layer.items()}
    heads_BTH = jnp.linalg.norm(layer["heads"], axis=-1)
    grouped_BTKG = heads_BTH.reshape(*heads_BTH.shape[:2], kv_heads, -1)
    before, after = layer["residual_in"], layer["residual_out"]
    lengths_BT = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(after, axis=-1)
    cosine_BT = jnp.sum(before * after, axis=-1) / jnp.maximum(lengths_BT, 1e-30)
    rows = {
        "heads": heads_BTH,
        "kv_heads": jnp.linalg.norm(grouped_BTKG, axis=-1),
        "mlp": layer["neurons"],
        "attention_embed": layer["attention_input"],
        "mlp_embed": layer["mlp_input"],
    }
    where = where_BT[..., None]
    return {name: _over_sequence(x, where_BT, how) for name, x in rows.items()} | {
        "cosine": jnp.sum(cosine_BT, where=where_BT),
        "attention_power": jnp.sum(jnp.square(layer["attention_input"]), axis=(0, 1), where=where),
        "mlp_power": jnp.sum(jnp.square(layer["mlp_input"]), axis=(0, 1), where=where),
    }


def _zeros(config: models.LlamaConfig) -> dict[str, Any]:
    L, D = config.layers, config.embed
    sizes = {
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "mlp": config.mlp,
        "attention_embed": D,
        "mlp_embed": D,
    }
    return {name: Moments.zeros((L, size)) for name, size in sizes.items()} | {
        "cosine": jnp.zeros((L,)),
        "attention_power": jnp.zeros((L, D)),
        "mlp_power": jnp.zeros((L, D)),
        "final_power": jnp.zeros((D,)),
        "tokens": jnp.zeros(()),
    }


@functools.partial(jax.jit, static_argnames=("config", "how"), donate_argnames="totals")
def _accumulate(
    totals: dict[str, Any],
    params: models.Params,
    tokens_BT: Array,
    segment_ids_BT: Array,
    *,
    config: models.LlamaConfig,
    how: Aggregation,
) -> dict[str, Any]:
    """The totals with one batch more."""
    where_BT = segment_ids_BT > 0
    hidden_BTD, observed = models.hidden_states(
        config,
        params,
        tokens_BT,
        segment_ids_BT,
        observe=lambda layer: _observe(layer, where_BT, config.kv_heads, how),
    )
    observed["tokens"] = jnp.sum(where_BT, dtype=jnp.float32)
    observed["final_power"] = jnp.sum(
        jnp.square(hidden_BTD.astype(jnp.float32)), axis=(0, 1), where=where_BT[..., None]
    )
    real_row_B = jnp.any(where_BT, axis=1).astype(jnp.float32)
    return {
        name: total.add(observed[name], real_row_B)
        if isinstance(total, Moments)
        else total + observed[name]
        for name, total in totals.items()
    }


def _relative_power(power: Array, weight: Array) -> Array:
    """Mean square of each channel before the norm's weight, scaled to sum to D over channels.

    A channel whose weight is zero cannot be seen through it; it is given the average share.
    """
    weight = weight.astype(jnp.float32)
    seen = weight != 0
    power = jnp.where(seen, power / jnp.square(jnp.where(seen, weight, 1.0)), 1.0)
    return power * power.shape[-1] / jnp.sum(power, axis=-1, keepdims=True)


def activation_scores(
    model: models.Model,
    batches: Iterable[Batch],
    sequence: Aggregation,
    batch_aggregation: Aggregation,
    batch_sharding: jax.sharding.Sharding | None,
) -> tuple[dict[str, Array], str]:
    """The arrays of `Scores` by name, and the fingerprint of the rows that they come from.

    Raises:
      InputError: the batches hold no tokens.
    """
    rows = hashlib.sha256()
    totals = _zeros(model.config)
    for batch in batches:
        tokens, segments = tokens_and_segments(batch, batch_sharding)
        rows.update(np.concatenate((tokens, segments), axis=1).tobytes())
        totals = _accumulate(
            totals,
            model.params,
            tokens,
            segments,
            config=model.config,
            how=sequence,
        )
    if not totals["tokens"] > 0:
        raise InputError("the calibration batches hold no tokens")
    scores = {
        name: total.aggregate(batch_aggregation)
        for name, total in totals.items()
        if isinstance(total, Moments)
    }
    embed_LD = scores.pop("attention_embed") + scores.pop("mlp_embed")
    layers, tokens = model.params["layers"], totals["tokens"]
    arrays = scores | {
        "layers": 1 - totals["cosine"] / tokens,
        "embed": jnp.sum(embed_LD, axis=0),
        "attention_power": _relative_power(
            totals["attention_power"] / tokens, layers["attention"]["norm"]
        ),
        "mlp_power": _relative_power(totals["mlp_power"] / tokens, layers["mlp"]["norm"]),
        "final_power": _relative_power(totals["final_power"] / tokens, model.params["final_norm"]),
    }
    return arrays, rows.hexdigest()[:16]
