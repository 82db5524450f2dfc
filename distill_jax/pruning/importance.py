"""Importance of layers, heads, neurons and channels, by the method of one's choice."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from distill_jax import models, parallel
from distill_jax.artifacts import check_choices, fingerprint
from distill_jax.pruning.activations import Aggregation, Batch, activation_scores
from distill_jax.pruning.calibration import Rows
from distill_jax.pruning.fluctuation import fluctuation_scores
from distill_jax.pruning.scores import Scores
from distill_jax.pruning.weights import magnitude_scores, taylor_scores

Method = Literal["activation", "taylor", "fluctuation", "magnitude", "random"]
"""What importance is measured by."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportanceConfig:
    """How parts of a model are ranked.

    Attributes:
      method: "activation" (Minitron, Muralidharan et al. 2024), "taylor" (LLM-Pruner, Ma et al.
        2023, see `taylor_scores`), "fluctuation" (FLAP, An et al. 2024, see
        `fluctuation_scores`), "magnitude" (root of the summed squares of the weights that touch a
        part) or "random"; the last two are controls.
      sequence_aggregation: of activations, how a row's tokens become one score: "mean" of |x|,
        "l2" norm, or "variance" of x.
      batch_aggregation: of activations, how rows become one score: the same choice, of the rows'
        scores.
      seed: of the random method.
    """

    method: Method = "activation"
    sequence_aggregation: Aggregation = "mean"
    batch_aggregation: Aggregation = "l2"
    seed: int = 0

    def __post_init__(self) -> None:
        literals = {
            "method": Method,
            "sequence_aggregation": Aggregation,
            "batch_aggregation": Aggregation,
        }
        check_choices(self, literals)

    def describe(self) -> str:
        """What `Scores.method` says."""
        if self.method == "activation":
            return f"activation {self.sequence_aggregation} {self.batch_aggregation}"
        return f"random {self.seed}" if self.method == "random" else self.method

    @property
    def reads_rows(self) -> bool:
        """Whether the method looks at calibration rows."""
        return self.method not in ("magnitude", "random")


def importance(
    model: models.Model,
    batches: Iterable[Batch],
    config: ImportanceConfig | None = None,
    *,
    batch_sharding: jax.sharding.Sharding | None = None,
) -> Scores:
    """Scores every prunable part of a model.

    The methods that read `batches` pass over them once; what they hold does not grow with their
    number. Scores do not depend on how rows are split into batches, beyond rounding.

    Args:
      model: the model to score.
      batches: calibration batches; padding (segment id 0) counts nowhere. "magnitude" and "random"
        do not read them.
      config: method and aggregations; None means the defaults.
      batch_sharding: where a batch is put; None leaves that to JAX.

    Raises:
      InputError: there are no tokens, a token is not in the model's vocabulary, or activations are
        not finite; the line names the layer and the axis.
    """
    config = config or ImportanceConfig()
    rows = Rows(batches, model.config.vocab_size)
    how = config.sequence_aggregation, config.batch_aggregation
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "activation": lambda: activation_scores(model, rows, *how, batch_sharding),
        "taylor": lambda: taylor_scores(model, rows, batch_sharding),
        "fluctuation": lambda: fluctuation_scores(model, rows, batch_sharding),
        "magnitude": lambda: magnitude_scores(model),
        "random": lambda: random_scores(model.config, config.seed),
    }
    found = parallel.to_host(measures[config.method]())
    arrays: dict[str, Any] = {name: np.asarray(value, np.float32) for name, value in found.items()}
    return Scores(
        **arrays,
        method=config.describe(),
        model=model_fingerprint(model),
        rows=rows.fingerprint,
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


def random_scores(config: models.LlamaConfig, seed: int) -> dict[str, Any]:
    """The arrays of `Scores` by name: parts in random order, channels of equal power."""
    random = np.random.default_rng(seed)
    L = config.layers
    channels = np.ones((L, config.embed))
    return {
        "attention_power": channels,
        "mlp_power": channels,
        "final_power": channels[0],
        "layers": random.random(L),
        "heads": random.random((L, config.heads)),
        "kv_heads": random.random((L, config.kv_heads)),
        "mlp": random.random((L, config.mlp)),
        "embed": random.random(config.embed),
    }
