"""The one training loop, which every stage that trains uses."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from distill_jax import parallel, progress
from distill_jax.models import Model, logical_axes
from distill_jax.training.checkpoints import Checkpoints
from distill_jax.training.config import TrainConfig
from distill_jax.training.goodput import Goodput, account, account_line, read_sessions
from distill_jax.training.jitted import JittedStep, check_rows, jit_step
from distill_jax.training.metrics import MetricsWriter
from distill_jax.training.profiling import Profiler
from distill_jax.training.step import LossFn, TrainState


def train(
    model: Model,
    loss_fn: LossFn,
    batches: Iterator[dict[str, Any]],
    config: TrainConfig,
    directory: str | os.PathLike[str],
    *,
    teachers: Mapping[str, Model] | None = None,
    before_batch: Callable[[Any, int], Mapping[str, float]] | None = None,
    name: str = "train",
    mesh: Mesh | None = None,
    split_time: bool = False,
    profile: tuple[int, int] | None = None,
) -> Model:
    """Trains `model` and returns it trained; `model` itself is left as it was.

    Called again on the directory of a run that was stopped at any moment, it goes on from the
    newest checkpoint and ends with the same parameters, bit for bit, on the same devices. Other
    devices or processes see the same batches, and add up in another order.

    Args:
      model: where to start.
      loss_fn: (params, batch, step) -> losses.Totals; with `teachers` it gets {name: parameters}
        of them besides.
      batches: Grain iterator of this process's share of the rows (`parallel.row_share`); every
        leaf of a batch has a leading axis of rows, and "tokens" is among them.
      config: how the run goes.
      directory: where checkpoints, metrics.jsonl, goodput.json and TensorBoard files go.
      teachers: models that run beside this one; they lie split as it does, and stay as they are.
        Of several processes each must have them on the mesh already.
      before_batch: is called with the parameters and the number of a step before its batch is
        taken, for batches of what the model itself writes; what it returns joins the step's
        metrics. It must not keep the parameters: the step consumes them. What it leaves for later
        steps belongs to the state of `batches`. On other devices a model may write something else.
      name: the stage, for the progress bar.
      mesh: devices; None takes all of them, as one FSDP group.
      split_time: whether devices along the mesh axis "sequence" share rows, as the losses of
        `language_model_loss` expect; else they have rows of their own.
      profile: the first and the last of the steps that are traced.

    Raises:
      InputError: the rows of a microbatch do not divide over the mesh.
      FloatingPointError: the loss or its gradient is not finite.
      Preempted: the job was told to stop (`parallel.stoppable`); a checkpoint of the step where
        all processes stopped is there.
    """
    mesh = mesh or parallel.make_mesh()
    check_rows(config, mesh, name, split_time=split_time)
    place = epath.Path(directory)
    place.mkdir(parents=True, exist_ok=True)
    with (
        parallel.deferring(),
        parallel.looping(),
        Goodput(place) as spent,
        Checkpoints(place / "checkpoints") as checkpoints,
    ):
        frozen = _placed(teachers, mesh)
        axes = logical_axes(model.config)
        jitted = jit_step(model.params, axes, loss_fn, config, mesh, *frozen, split_time=split_time)
        share = parallel.row_share(jitted.rows)
        state = _start(model, jitted, checkpoints, batches)
        first = int(state.step)
        spent.begin(first)
        pending: tuple[int, int, Any] | None = None
        with (
            MetricsWriter(place, first) as writer,
            Profiler(profile, place, name) as profiler,
            progress.bar(name, config.steps, done=first) as bar,
        ):
            for step in range(first + 1, config.steps + 1):
                figures: Mapping[str, float] = {}
                if before_batch is not None:
                    with spent.on("rollout", step):
                        figures = before_batch(state.params, step)
                with spent.on("data", step, unless_busy=state.step):
                    batch = share.put(next(batches))
                profiler.before(step, state)
                doing = "compile" if step == first + 1 else "step"
                with spent.on(doing, step), profiler.annotated(step):
                    state, metrics = jitted.function(state, batch, *frozen)
                profiler.after(step, state)
                # Fetch the step before while the device works on this one.
                note = _report(writer, pending)
                tokens = batch["tokens"].size
                stop = parallel.preempted()
                due = (stop or step % config.checkpoint_every == 0) and step < config.steps
                logged = due or step % config.log_every == 0 or step == config.steps
                pending = (step, step * tokens, {**metrics, **figures}) if logged else None
                bar.advance(tokens=tokens, note=note)
                if due:
                    # First, so that parameters that are not finite never replace good ones.
                    _report(writer, pending)
                    pending = None
                    with spent.on("checkpoint", step):
                        checkpoints.save(step, state, batches, wait=stop)
                spent.done(step, record=due)
                if due and stop:
                    raise parallel.Preempted(f"{name}: stopped after step {step}")
            _report(writer, pending)
    if parallel.is_main():
        print(f"{name}: {account_line(account(read_sessions(place)))}", file=sys.stderr)
    return Model(model.config, state.params)


def _placed(teachers: Mapping[str, Model] | None, mesh: Mesh) -> tuple[dict[str, Any], ...]:
    """What the step gets of the teachers, if there are any."""

    def put(model: Model) -> Any:
        places = parallel.shardings(mesh, logical_axes(model.config), model.params)
        return jax.device_put(model.params, places)

    return ({name: put(model) for name, model in teachers.items()},) if teachers else ()


def _start(model: Model, jitted: JittedStep, checkpoints: Checkpoints, batches: Any) -> TrainState:
    """The newest checkpoint, or step 0."""
    state = checkpoints.restore(jitted.state, batches)
    if state is not None:
        return state
    shardings = jax.tree.map(lambda leaf: leaf.sharding, jitted.state)
    # The step donates its state, so it must own its buffers.
    params = jax.device_put(model.params, shardings.params, may_alias=False)
    opt_state = jax.jit(jitted.optimizer.init, out_shardings=shardings.opt_state)(params)
    zero = jitted.state.step.dtype.type(0)
    return TrainState(params, opt_state, jax.device_put(zero, shardings.step))


def _report(writer: MetricsWriter, pending: tuple[int, int, Any] | None) -> str:
    if pending is None:
        return ""
    return f"loss {writer.write(*pending)['loss']:.3f}"
