"""The one loop that every stage uses: state, step, optimizer, checkpoints, metrics."""

from distill_jax.training.config import OptimizerConfig, TrainConfig, learning_rate, make_optimizer
from distill_jax.training.language_model import language_model_loss
from distill_jax.training.loop import state_shardings, train
from distill_jax.training.metrics import MetricsWriter, read_metrics
from distill_jax.training.step import LossFn, TrainState, make_step, sum_gradients

__all__ = [
    "LossFn",
    "MetricsWriter",
    "OptimizerConfig",
    "TrainConfig",
    "TrainState",
    "language_model_loss",
    "learning_rate",
    "make_optimizer",
    "make_step",
    "read_metrics",
    "state_shardings",
    "sum_gradients",
    "train",
]
