"""Activation scores: each row's tokens become a row of scores, and rows stream into moments.

Dimensions: B rows, T time, L layers, H query heads, K kv heads, G = H / K, C head_dim, F mlp,
D embed.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from distill_jax import models, parallel
from distill_jax.artifacts import InputError

Aggregation = Literal["mean", "l2", "variance"]
"""How scores are summed up over tokens, or over rows (Minitron 2024, 2.2)."""

Batch = Mapping[str, Any]
"""What calibration reads: "tokens" [B, T] and, where rows are packed, "segment_ids" [B, T]."""


def tokens_and_segments(
    batch: Batch, sharding: jax.sharding.Sharding | None
) -> tuple[Array, Array]:
    """A batch's token ids and segment ids, `padded` and placed on devices."""
    tokens, segments = padded(batch, sharding)
    return jax.device_put(tokens, sharding), jax.device_put(segments, sharding)


def padded(batch: Batch, sharding: jax.sharding.Sharding | None) -> tuple[np.ndarray, np.ndarray]:
    """A batch's token ids and segment ids (ones where it has none).

    Rows of padding fill it up where the sharding would not divide it.
    """
    tokens = np.asarray(batch["tokens"], np.int32)
    segments = np.asarray(batch.get("segment_ids", np.ones_like(tokens)), np.int32)
    if isinstance(sharding, jax.sharding.NamedSharding) and len(sharding.spec):
        axes = parallel.names_of(sharding.spec[0])
        missing = -len(tokens) % math.prod(sharding.mesh.shape[axis] for axis in axes)
        tokens, segments = (np.pad(x, ((0, missing), (0, 0))) for x in (tokens, segments))
    return tokens, segments


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

    @classmethod
    def of(cls, rows: Array, weight_B: Array) -> "Moments":
        """Of one batch: rows [..., B, n] of weight 0 or 1."""
        weight = weight_B[:, None]
        count = jnp.sum(weight_B)
        mean = jnp.sum(rows * weight, axis=-2) / jnp.maximum(count, 1)
        deviation = jnp.sum(jnp.square(rows - mean[..., None, :]) * weight, axis=-2)
        return cls(count, mean, deviation)

    def merge(self, other: "Moments") -> "Moments":
        """Of the rows of both. A count is a scalar, or has the mean's axes but the last."""
        count = self.count + other.count
        share = (other.count / jnp.maximum(count, 1))[..., None]
        shift = other.mean - self.mean
        return Moments(
            count,
            self.mean + shift * share,
            self.deviation + other.deviation + jnp.square(shift) * self.count[..., None] * share,
        )

    def aggregate(self, how: Aggregation) -> Array:
        """The rows' mean, L2 norm or variance. Rows' scores are never negative."""
        if how == "mean":
            return self.mean
        if how == "variance":
            return self.deviation / self.count[..., None]
        return jnp.sqrt(self.deviation + self.count[..., None] * jnp.square(self.mean))


_PASSED = {"attention_input": "embed", "heads": "heads", "mlp_input": "embed", "neurons": "mlp"}
"""A layer's activations in the order in which they are computed -> their logical axis."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Powers:
    """Sums over tokens of the squares of what norms give out, from which their scales are made.

    Attributes:
      attention: [L, D], at the attention norms.
      mlp: [L, D], at the feed-forward norms.
      damaged: [L, 4], how many numbers were NaN or infinite, by the activations of `_PASSED`.
      final: [D], at the last norm.
      tokens: [], how many tokens.
    """

    attention: Array
    mlp: Array
    damaged: Array
    final: Array
    tokens: Array

    @classmethod
    def zeros(cls, config: models.LlamaConfig) -> "Powers":
        """Of no tokens."""
        L, D = config.layers, config.embed
        shapes = {
            "attention": (L, D),
            "mlp": (L, D),
            "damaged": (L, len(_PASSED)),
            "final": (D,),
            "tokens": (),
        }
        return cls(**{name: jnp.zeros(shape) for name, shape in shapes.items()})

    @classmethod
    def of(cls, layers: dict[str, Array], final_BD: Array, where_BT: Array) -> "Powers":
        """Of one batch: its `layer_powers` [L, B, ...], and `power` of the final hidden states."""
        sums = {name: jnp.sum(rows, axis=1) for name, rows in layers.items()}
        tokens = jnp.sum(where_BT, dtype=jnp.float32)
        return cls(**sums, final=jnp.sum(final_BD, axis=0), tokens=tokens)

    def __add__(self, other: "Powers") -> "Powers":
        return jax.tree.map(jnp.add, self, other)

    def relative(self, params: models.Params) -> dict[str, Array]:
        """The powers of `Scores`.

        Raises:
          InputError: there were no tokens, or activations were not finite.
        """
        if not self.tokens > 0:
            raise InputError("the calibration batches hold no tokens")
        damaged = np.argwhere(parallel.to_host(self.damaged))
        if len(damaged):
            layer, which = damaged[0]
            raise InputError(
                f"calibration: activations of layer {layer} are NaN or infinite, first along the "
                f"axis {list(_PASSED.values())[which]!r}; the weights are damaged or overflow"
            )
        layers = params["layers"]
        sums = {
            "attention_power": (self.attention, layers["attention"]["norm"]),
            "mlp_power": (self.mlp, layers["mlp"]["norm"]),
            "final_power": (self.final, params["final_norm"]),
        }
        return {
            name: _relative_power(power / self.tokens, weight)
            for name, (power, weight) in sums.items()
        }


def layer_powers(layer: dict[str, Array], where_BT: Array) -> dict[str, Array]:
    """One layer's part of `Powers`, by row, for `models.hidden_states` to observe."""

    def damaged(x: Array) -> Array:
        broken_BT = jnp.any(~jnp.isfinite(x.reshape(*where_BT.shape, -1)), axis=-1)
        return jnp.sum(broken_BT, axis=1, where=where_BT, dtype=jnp.float32)

    return {
        "attention": power(layer["attention_input"], where_BT),
        "mlp": power(layer["mlp_input"], where_BT),
        "damaged": jnp.stack([damaged(layer[name]) for name in _PASSED], axis=-1),
    }


def power(x_BTD: Array, where_BT: Array) -> Array:
    """Sum of squares by row and channel [B, D], over real tokens."""
    squares = jnp.square(x_BTD.astype(jnp.float32))
    return jnp.sum(squares, axis=1, where=where_BT[..., None])


def _relative_power(power: Array, weight: Array) -> Array:
    """Mean square of each channel before the norm's weight, scaled to sum to D over channels.

    A channel whose weight is zero cannot be seen through it; it is given the average share.
    """
    weight = weight.astype(jnp.float32)
    seen = weight != 0
    power = jnp.where(seen, power / jnp.square(jnp.where(seen, weight, 1.0)), 1.0)
    return power * power.shape[-1] / jnp.sum(power, axis=-1, keepdims=True)


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
    """One layer's scores of a batch's rows [B, n], and sums over tokens [B]."""
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
    return {name: _over_sequence(x, where_BT, how) for name, x in rows.items()} | {
        "cosine": jnp.sum(cosine_BT, axis=1, where=where_BT),
    }


def zeros(config: models.LlamaConfig) -> dict[str, Any]:
    """The totals of `accumulate` before the first batch."""
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
        "powers": Powers.zeros(config),
    }


@functools.partial(
    jax.jit, static_argnames=("config", "how", "batch_sharding"), donate_argnames="totals"
)
def accumulate(
    totals: dict[str, Any],
    params: models.Params,
    tokens_BT: Array,
    segment_ids_BT: Array,
    *,
    config: models.LlamaConfig,
    how: Aggregation,
    batch_sharding: jax.sharding.Sharding | None,
) -> dict[str, Any]:
    """The totals with one batch more, which lies as `batch_sharding` says.

    Where that is `parallel.batch_sharding`, every device reads rows of its own.
    """
    read: Callable[..., Any] = functools.partial(_read, config, how)
    mesh: Any = getattr(batch_sharding, "mesh", None)
    split = mesh is not None and batch_sharding == parallel.batch_sharding(mesh)
    if split and parallel.row_shards(mesh) > 1:
        shares = parallel.Shares(mesh, models.logical_axes(config), params)
        reading = models.Reading.of(shares)
        read = parallel.map_rows(functools.partial(read, reading=reading), shares)
    else:
        read = functools.partial(read, rows=batch_sharding)
    by_row, final_BD = read(params, tokens_BT, segment_ids_BT)
    observed, powers = _swap_rows(by_row)
    where_BT = segment_ids_BT > 0
    real_row_B = jnp.any(where_BT, axis=1).astype(jnp.float32)
    return {
        name: total.merge(Moments.of(observed[name], real_row_B))
        for name, total in totals.items()
        if isinstance(total, Moments)
    } | {
        "cosine": totals["cosine"] + jnp.sum(observed["cosine"], axis=1),
        "powers": totals["powers"] + Powers.of(powers, final_BD, where_BT),
    }


def _read(
    config: models.LlamaConfig,
    how: Aggregation,
    params: models.Params,
    tokens_BT: Array,
    segment_ids_BT: Array,
    **reading: Any,
) -> Any:
    """What rows show, [B, ...] so that rows can be split, and the power of their final states.

    `reading` says how `models.hidden_states` has layers and rows.
    """
    where_BT = segment_ids_BT > 0

    def observe(layer: dict[str, Array]) -> Any:
        return _observe(layer, where_BT, config.kv_heads, how), layer_powers(layer, where_BT)

    hidden_BTD, observed = models.hidden_states(
        config, params, tokens_BT, segment_ids_BT, observe=observe, **reading
    )
    return _swap_rows(observed), power(hidden_BTD, where_BT)


def _swap_rows(tree: Any) -> Any:
    """[L, B, ...] <-> [B, L, ...]."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tree)


def activation_scores(
    model: models.Model,
    batches: Iterable[Batch],
    sequence: Aggregation,
    batch_aggregation: Aggregation,
    batch_sharding: jax.sharding.Sharding | None,
) -> dict[str, Array]:
    """The arrays of `Scores` by name.

    Raises:
      InputError: the batches hold no tokens.
    """
    totals = zeros(model.config)
    for batch in batches:
        tokens, segments = tokens_and_segments(batch, batch_sharding)
        totals = accumulate(
            totals,
            model.params,
            tokens,
            segments,
            config=model.config,
            how=sequence,
            batch_sharding=batch_sharding,
        )
    powers: Powers = totals.pop("powers")
    arrays = powers.relative(model.params)
    cosine = totals.pop("cosine")
    scores = {name: total.aggregate(batch_aggregation) for name, total in totals.items()}
    embed_LD = scores.pop("attention_embed") + scores.pop("mlp_embed")
    return arrays | scores | {"layers": 1 - cosine / powers.tokens, "embed": embed_LD.sum(axis=0)}
