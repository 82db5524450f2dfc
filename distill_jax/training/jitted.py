"""The step as it is jitted: where everything lies, and what it is called with."""

import dataclasses
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distill_jax import parallel
from distill_jax.artifacts import InputError
from distill_jax.training.config import TrainConfig, make_optimizer
from distill_jax.training.step import LossFn, TrainState, make_step


@dataclasses.dataclass(frozen=True)
class JittedStep:
    """The step that `train` runs; made by `jit_step`.

    Attributes:
      function: jitted (state, batch, *frozen) -> (state, metrics); the state that is given is
        consumed, the rest is not.
      state: shapes, types and shardings of the state, as ShapeDtypeStructs.
      rows: the sharding of every leaf of a batch.
      optimizer: the optimizer, whose state is part of the state.
    """

    function: Any
    state: TrainState
    rows: NamedSharding
    optimizer: optax.GradientTransformation


def jit_step(
    params: Any,
    axes: Any,
    loss_fn: LossFn,
    config: TrainConfig,
    mesh: Mesh,
    *frozen: Any,
    split_time: bool = False,
) -> JittedStep:
    """The step of a run on a mesh; nothing is computed or placed.

    Args:
      params: float32 parameters, or their ShapeDtypeStructs.
      axes: their logical axes, in the same tree.
      loss_fn: (params, batch, step, *frozen) -> losses.Totals.
      config: how the run goes.
      mesh: its devices, which need not be there.
      *frozen: trees that the loss reads besides: arrays where they lie, or their ShapeDtypeStructs.
      split_time: see `train`.
    """
    optimizer = make_optimizer(config.optimizer, config.steps, axes)
    shardings = state_shardings(mesh, axes, params, optimizer)
    rows = parallel.batch_sharding(mesh, split_time=split_time)
    shapes = jax.eval_shape(lambda params: TrainState.create(params, optimizer), params)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
    step = make_step(loss_fn, optimizer, accumulation=config.accumulation)
    function = jax.jit(
        step,
        donate_argnums=0,  # the old state's memory holds the new one
        in_shardings=(shardings, rows, *jax.tree.map(lambda x: x.sharding, frozen)),
        out_shardings=(shardings, None),
        compiler_options=parallel.compiler_options(mesh) or None,
    )
    return JittedStep(function, state, rows, optimizer)


def state_shardings(
    mesh: Mesh, axes: Any, params: Any, optimizer: optax.GradientTransformation
) -> Any:
    """A TrainState of shardings: moments live beside their parameters, the rest is whole."""
    whole = NamedSharding(mesh, PartitionSpec())
    params_shardings = parallel.shardings(mesh, axes, params)
    opt_state = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        params_shardings,
        transform_non_params=lambda _: whole,
    )
    return TrainState(params_shardings, opt_state, whole)  # type: ignore[arg-type]


def check_rows(config: TrainConfig, mesh: Mesh, name: str, *, split_time: bool = False) -> None:
    """Checks that the rows of a microbatch divide over the mesh.

    Raises:
      InputError: they do not.
    """
    row_shards = parallel.row_shards(mesh, split_time=split_time)
    if config.batch_rows // config.accumulation % row_shards:
        raise InputError(
            f"{name}: batch_rows {config.batch_rows} / accumulation {config.accumulation} is not a "
            f"multiple of the {row_shards} devices that rows are split over"
        )
