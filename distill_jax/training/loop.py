"""The one training loop, which every stage that trains uses."""

import os
from collections.abc import Iterator
from typing import Any

import jax
import optax
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distill_jax import parallel, progress
from distill_jax.artifacts import InputError
from distill_jax.models import Model, logical_axes
from distill_jax.training.checkpoints import Checkpoints
from distill_jax.training.config import TrainConfig, make_optimizer
from distill_jax.training.metrics import MetricsWriter
from distill_jax.training.step import LossFn, TrainState, make_step


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


def train(
    model: Model,
    loss_fn: LossFn,
    batches: Iterator[dict[str, Any]],
    config: TrainConfig,
    directory: str | os.PathLike[str],
    *,
    name: str = "train",
    mesh: Mesh | None = None,
) -> Model:
    """Trains `model` and returns it trained; `model` itself is left as it was.

    Called again on the directory of a run that was stopped at any moment, it goes on from the
    newest checkpoint and ends with the same parameters, bit for bit, on the same devices.

    Args:
      model: where to start.
      loss_fn: (params, batch, step) -> losses.Totals.
      batches: Grain iterator of this process's rows; every leaf of a batch has a leading axis of
        rows, and "tokens" is among them.
      config: how the run goes.
      directory: where checkpoints, metrics.jsonl and TensorBoard files go.
      name: the stage, for the progress bar.
      mesh: devices; None takes all of them, as one FSDP group.

    Raises:
      InputError: the rows of a microbatch do not divide over the mesh.
      FloatingPointError: the loss or its gradient is not finite.
    """
    mesh = mesh or parallel.make_mesh()
    _check_rows(config, mesh, name)
    axes = logical_axes(model.config)
    optimizer = make_optimizer(config.optimizer, config.steps, axes)
    shardings = state_shardings(mesh, axes, model.params, optimizer)
    rows = parallel.batch_sharding(mesh)
    step_fn = _jit_step(loss_fn, optimizer, config, shardings, rows)
    place = epath.Path(directory)
    place.mkdir(parents=True, exist_ok=True)
    with Checkpoints(place / "checkpoints") as checkpoints:
        state = _start(model, optimizer, shardings, checkpoints, batches)
        first = int(state.step)
        pending: tuple[int, int, Any] | None = None
        with (
            MetricsWriter(place, first) as writer,
            progress.bar(name, config.steps, done=first) as bar,
        ):
            for step in range(first + 1, config.steps + 1):
                local = next(batches)
                batch = jax.tree.map(
                    lambda x: jax.make_array_from_process_local_data(rows, x), local
                )
                state, metrics = step_fn(state, batch)
                # Fetch the step before while the device works on this one.
                note = _report(writer, pending)
                tokens = batch["tokens"].size
                due = step % config.checkpoint_every == 0 and step < config.steps
                logged = due or step % config.log_every == 0 or step == config.steps
                pending = (step, step * tokens, metrics) if logged else None
                bar.advance(tokens=tokens, note=note)
                if due:
                    # First, so that parameters that are not finite never replace good ones.
                    _report(writer, pending)
                    pending = None
                    checkpoints.save(step, state, batches)
            _report(writer, pending)
    return Model(model.config, state.params)


def _check_rows(config: TrainConfig, mesh: Mesh, name: str) -> None:
    row_shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch_rows // config.accumulation % row_shards:
        raise InputError(
            f"{name}: batch_rows {config.batch_rows} / accumulation {config.accumulation} is not a "
            f"multiple of the {row_shards} devices that rows are split over"
        )


def _jit_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    shardings: TrainState,
    rows: jax.sharding.Sharding,
) -> Any:
    step = make_step(
        loss_fn, optimizer, accumulation=config.accumulation, compute_dtype=config.compute_dtype
    )
    return jax.jit(
        step,
        donate_argnums=0,  # the old state's memory holds the new one
        in_shardings=(shardings, rows),
        out_shardings=(shardings, None),
    )


def _start(
    model: Model,
    optimizer: optax.GradientTransformation,
    shardings: Any,
    checkpoints: Checkpoints,
    batches: Any,
) -> TrainState:
    """The newest checkpoint, or step 0."""
    shapes = jax.eval_shape(lambda params: TrainState.create(params, optimizer), model.params)
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
    state = checkpoints.restore(like, batches)
    if state is not None:
        return state
    # The step donates its state, so it must own its buffers.
    params = jax.device_put(model.params, shardings.params, may_alias=False)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    return TrainState(params, opt_state, jax.device_put(shapes.step.dtype.type(0), shardings.step))


def _report(writer: MetricsWriter, pending: tuple[int, int, Any] | None) -> str:
    if pending is None:
        return ""
    return f"loss {writer.write(*pending)['loss']:.3f}"
