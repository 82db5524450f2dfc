"""Importance of layers, heads, neurons and channels, from activations, weights, or by chance.

Dimensions: B rows, T time, L layers, H query heads, K kv heads, C head_dim, F mlp, D embed.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from distill_jax import models
from distill_jax.artifacts import InputError, fingerprint
from distill_jax.pruning.activations import Aggregation, Batch, activation_scores
from distill_jax.pruning.scores import Scores

Method = Literal["activation", "magnitude", "random"]
"""What importance is measured by."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportanceConfig:
    """How parts of a model are ranked.

    Attributes:
      method: "activation" (Minitron, Muralidharan et al. 2024), "magnitude" (root of the summed
        squares of the weights that touch a part) or "random"; the last two are controls.
      sequence_aggregation: how a row's tokens become one score: "mean" of |x|, "l2" norm, or
        "variance" of x.
      batch_aggregation: how rows become one score: the same choice, of the rows' scores.
      seed: of the random method.
    """

    method: Method = "activation"
    sequence_aggregation: Aggregation = "mean"
    batch_aggregation: Aggregation = "l2"
    seed: int = 0

    def __post_init__(self) -> None:
        allowed = {
            "method": Method,
            "sequence_aggregation": Aggregation,
            "batch_aggregation": Aggregation,
        }
        for name, literal in allowed.items():
            value, choices = getattr(self, name), get_args(literal)
            if value not in choices:
                raise InputError(f"{name} is {value!r}; choose one of {', '.join(choices)}")


def importance(
    model: models.Model,
    batches: Iterable[Batch],
    config: ImportanceConfig | None = None,
    *,
    batch_sharding: jax.sharding.Sharding | None = None,
) -> Scores:
    """Scores every prunable part of a model.

    The activation method makes one forward pass over `batches`; what it holds does not grow with
    their number. Its scores do not depend on how rows are split into batches, beyond rounding.

    Args:
      model: the model to score.
      batches: calibration batches; padding (segment id 0) counts nowhere. Only "activation" reads
        them.
      config: method and aggregations; None means the defaults.
      batch_sharding: where a batch is put; None leaves that to JAX.

    Raises:
      InputError: the activation method got no tokens.
    """
    config = config or ImportanceConfig()
    rows = ""
    if config.method == "activation":
        sequence, batch = config.sequence_aggregation, config.batch_aggregation
        arrays, rows = activation_scores(model, batches, sequence, batch, batch_sharding)
        method = f"activation {sequence} {batch}"
    else:
        arrays = _unit_power(model.config)
        if config.method == "magnitude":
            arrays |= _magnitude_scores(model)
            method = "magnitude"
        else:
            arrays |= _random_scores(model.config, config.seed)
            method = f"random {config.seed}"
    return Scores(
        **{name: np.asarray(value, np.float32) for name, value in arrays.items()},
        method=method,
        model=model_fingerprint(model),
        rows=rows,
    )


@jax.jit
def _checksums(params: models.Params) -> list[Array]:
    """Per leaf, a sum modulo 2^32 of its bits times odd weights that depend on the position.

    Integer sums do not depend on their order, hence not on the devices that hold the leaf.
    """

    def checksum(leaf: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
        weight = jnp.uint32(1)
        for axis, size in enumerate(leaf.shape):
            place = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
            weight = weight * jnp.uint32(size | 1) + place
        return jnp.sum(bits * (2 * weight + 1), dtype=jnp.uint32)

    return [checksum(leaf) for leaf in jax.tree.leaves(params)]


def model_fingerprint(model: models.Model) -> str:
    """Sixteen hex digits that tell one model's shape and weights from another's."""
    sums = [int(value) for value in _checksums(model.params)]
    return fingerprint({"config": model.config.to_json(), "weights": sums})


def _unit_power(config: models.LlamaConfig) -> dict[str, Any]:
    """Power of channels that all carry the same, for methods that see no activations."""
    channels = np.ones((config.layers, config.embed))
    return {"attention_power": channels, "mlp_power": channels, "final_power": channels[0]}


def _magnitude_scores(model: models.Model) -> dict[str, Any]:
    """Root of the summed squares of all weights that bear an axis, for each index of that axis."""
    axes = models.logical_axes(model.config)

    def score(axis: str, *, per_layer: bool) -> Array:
        kept = ("layers", axis) if per_layer else (axis,)

        def squares(names: tuple[str, ...], leaf: Array) -> Array:
            if not set(kept) <= set(names):
                return jnp.zeros(())
            summed = tuple(i for i, name in enumerate(names) if name not in kept)
            return jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=summed)

        leaves = jax.tree.map(squares, axes, model.params, is_leaf=lambda x: isinstance(x, tuple))
        return jnp.sqrt(jax.tree.reduce(jnp.add, leaves))

    return {
        "layers": score("layers", per_layer=False),
        "heads": score("heads", per_layer=True),
        "kv_heads": score("kv_heads", per_layer=True),
        "mlp": score("mlp", per_layer=True),
        "embed": score("embed", per_layer=False),
    }


def _random_scores(config: models.LlamaConfig, seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    L = config.layers
    return {
        "layers": random.random(L),
        "heads": random.random((L, config.heads)),
        "kv_heads": random.random((L, config.kv_heads)),
        "mlp": random.random((L, config.mlp)),
        "embed": random.random(config.embed),
    }
