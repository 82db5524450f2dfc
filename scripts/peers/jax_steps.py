"""The training step of distill_jax, compiled as `training.train` compiles it."""

import jax
import numpy as np

from distill_jax import losses, models, parallel, training


def build(name, folder, rows, settings):
    """A function of no arguments that takes a step and returns its loss and gradient norm."""
    del name
    model = models.load(str(folder))
    terms = {"hard": (settings["hard"], losses.hard_labels())}
    batch = {key: rows[key] for key in ("tokens", "segment_ids", "labels", "where")}
    teacher_targets = None
    if settings["soft"]:
        terms["soft"] = settings["soft"], losses.distill("teacher", losses.forward_kl)
        batch["targets"] = {key: rows[key] for key in ("ids", "weights", "entropy")}
        teacher_targets = _sampled
    mesh = parallel.make_mesh()
    loss_fn = training.language_model_loss(
        model.config, losses.weighted_sum(**terms), teacher_targets=teacher_targets, mesh=mesh
    )
    config = training.TrainConfig(
        steps=1000,
        batch_rows=len(rows["tokens"]),
        optimizer=training.OptimizerConfig(
            **settings["adamw"], schedule="constant", warmup_fraction=0.0
        ),
    )
    axes = models.logical_axes(model.config)
    jitted = training.jit_step(model.params, axes, loss_fn, config, mesh)
    create = jax.jit(
        lambda params: training.TrainState.create(params, jitted.optimizer),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, jitted.state),
    )
    state = create(model.params)
    share = parallel.row_share(jitted.rows)

    def step():
        nonlocal state
        state, metrics = jitted.function(state, share.put(batch))
        jax.block_until_ready(state)
        return np.asarray(metrics["loss"]), np.asarray(metrics["gradient_norm"])

    return step


def _sampled(stored):
    return {"teacher": losses.SampledTargets(**stored)}
