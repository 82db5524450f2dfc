"""One optimizer step: state in, state out."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from distill_jax.losses import Totals

LossFn = Callable[..., Totals]
"""(params, batch, step, *frozen) -> sums of loss and weight over the batch; `frozen` are trees that
it reads besides, such as the parameters of a teacher, and that nothing changes."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes.

    Attributes:
      params: float32 parameters.
      opt_state: the optimizer's state.
      step: number of optimizer steps taken, int32.
    """

    params: Any
    opt_state: Any
    step: Array

    @classmethod
    def create(cls, params: Any, optimizer: optax.GradientTransformation) -> "TrainState":
        """The state before the first step."""
        return cls(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def split_rows(batch: Any, parts: int) -> Any:
    """[B, ...] -> [parts, B / parts, ...]; rows are dealt in turn: each device keeps its share."""
    return jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1), batch
    )


def sum_gradients(
    loss_fn: LossFn, params: Any, batch: Any, step: Array, parts: int, *frozen: Any
) -> tuple[Any, Totals]:
    """Gradient of the SUM of losses over a batch, taken in `parts` microbatches, and the totals.

    Sums add up to the same whatever the split; who divides by the weight does it once.
    """

    def gradients(microbatch: Any) -> tuple[Any, Totals]:
        def loss(params: Any) -> tuple[Array, Totals]:
            totals = loss_fn(params, microbatch, step, *frozen)
            return totals.loss, totals

        grads, totals = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), totals

    if parts == 1:
        return gradients(batch)
    microbatches = split_rows(batch, parts)
    shapes = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], microbatches))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(carry: Any, microbatch: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, gradients(microbatch)), None

    return jax.lax.scan(add, zeros, microbatches)[0]


def make_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    accumulation: int = 1,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """The function that a run jits: (state, batch, *frozen) -> (state, metrics).

    The loss is divided once, by the weight of the whole global batch. A batch of no weight
    leaves a zero gradient. Metrics: "loss", "weight", "gradient_norm" and each term's mean.
    """

    def step(state: TrainState, batch: Any, *frozen: Any) -> tuple[TrainState, dict[str, Array]]:
        grads, totals = sum_gradients(
            loss_fn, state.params, batch, state.step, accumulation, *frozen
        )
        weight = jnp.maximum(totals.weight, jnp.finfo(jnp.float32).tiny)
        grads = jax.tree.map(lambda g: g / weight, grads)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        loss, terms = totals.mean()
        metrics = {
            "loss": loss,
            "weight": totals.weight,
            "gradient_norm": optax.tree.norm(grads),
            **terms,
        }
        return TrainState(params, opt_state, state.step + 1), metrics

    return step
