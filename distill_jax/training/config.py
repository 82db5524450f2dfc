"""How a training run goes, and the optimizer it uses."""

import dataclasses
from typing import Any, Literal

import jax
import optax

from distill_jax.artifacts import InputError
from distill_jax.models.llama import Remat


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up and a decay to `final_fraction` of the peak.

    Attributes:
      learning_rate: the peak.
      schedule: what follows the warm-up: "cosine", "linear" or "constant".
      warmup_fraction: share of the steps, n of them, that rise: peak / (n + 1), 2 peak / (n + 1)...
      final_fraction: what the rate decays to, over the peak; reached just after the last step.
      weight_decay: decoupled weight decay; norm weights are spared.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      clip_norm: largest global norm of the gradient.
    """

    learning_rate: float = 1e-3
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: float = 0.05
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps", "clip_norm"):
            if not getattr(self, name) > 0:
                raise InputError(
                    f"OptimizerConfig.{name} is {getattr(self, name)}; it must be positive"
                )
        for name in ("warmup_fraction", "final_fraction", "b1", "b2"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"OptimizerConfig.{name} is {getattr(self, name)}; in [0, 1]")
        if self.weight_decay < 0:
            raise InputError(
                f"OptimizerConfig.weight_decay is {self.weight_decay}; it must be >= 0"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run of the training loop.

    Attributes:
      steps: optimizer steps.
      batch_rows: rows in a global batch, over all processes and accumulation steps.
      accumulation: microbatches that one optimizer step is made of.
      optimizer: the optimizer.
      seed: orders the data.
      remat: what the backward pass recomputes inside a layer.
      compute_dtype: type of parameters and activations in the forward and backward pass, which a
        stage gives to its loss function; the optimizer's copy stays float32. A loss function of
        your own casts for itself.
      checkpoint_every: steps between checkpoints.
      log_every: steps between lines of metrics.
    """

    steps: int
    batch_rows: int = 8
    accumulation: int = 1
    optimizer: OptimizerConfig = OptimizerConfig()
    seed: int = 0
    remat: Remat = "none"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    checkpoint_every: int = 100
    log_every: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "batch_rows", "accumulation", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"TrainConfig.{name} is {getattr(self, name)}; it must be positive"
                )
        if self.batch_rows % self.accumulation:
            raise InputError(
                f"TrainConfig.batch_rows {self.batch_rows} is not a multiple of "
                f"accumulation {self.accumulation}"
            )


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate as a function of the step, over a run of `steps` steps."""
    warmup = round(config.warmup_fraction * steps)
    peak, decay = config.learning_rate, max(steps - warmup, 1)
    final = peak * config.final_fraction
    after = {
        "cosine": optax.cosine_decay_schedule(peak, decay, config.final_fraction),
        "linear": optax.linear_schedule(peak, final, decay),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    # The first step already moves: a warm-up of n steps takes peak/(n+1), ..., peak.
    rise = optax.linear_schedule(peak / (warmup + 1), peak, max(warmup, 1))
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int, axes: Any) -> optax.GradientTransformation:
    """The optimizer of a run of `steps` steps over parameters with logical axes `axes`."""
    is_names = lambda node: isinstance(node, tuple)  # noqa: E731
    decayed = jax.tree.map(
        lambda names: set(names) - {"layers"} != {"embed"}, axes, is_leaf=is_names
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )
