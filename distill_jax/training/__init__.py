"""The one loop that every stage uses: state, step, optimizer, checkpoints, metrics."""

from distill_jax.training.config import OptimizerConfig, TrainConfig, learning_rate, make_optimizer
from distill_jax.training.goodput import Goodput, account, account_line, read_sessions
from distill_jax.training.jitted import JittedStep, check_rows, jit_step, state_shardings
from distill_jax.training.language_model import language_model_loss, loss_of_rows, values_of_rows
from distill_jax.training.loop import train
from distill_jax.training.metrics import MetricsWriter, read_metrics
from distill_jax.training.profiling import parse_steps
from distill_jax.training.step import LossFn, TrainState, make_step, sum_gradients

__all__ = [
    "Goodput",
    "JittedStep",
    "LossFn",
    "MetricsWriter",
    "OptimizerConfig",
    "TrainConfig",
    "TrainState",
    "account",
    "account_line",
    "check_rows",
    "jit_step",
    "language_model_loss",
    "learning_rate",
    "loss_of_rows",
    "make_optimizer",
    "make_step",
    "parse_steps",
    "read_metrics",
    "read_sessions",
    "state_shardings",
    "sum_gradients",
    "train",
    "values_of_rows",
]
