"""sft, rejection-sample and dpo: from a model of text to one that answers."""

from collections.abc import Sequence
from typing import Any

from etils import epath
from jax.sharding import Mesh

from distill_jax import models, parallel, posttraining, training
from distill_jax.artifacts import InputError
from distill_jax.pipeline import Stage
from distill_jax.recipe import PostTrainingConfig, to_json
from distill_jax.stages import context
from distill_jax.stages.context import CORPUS, DPO, REJECTION, SFT, Run


def stages(run: Run) -> list[Stage]:
    """The three stages, each of which starts from the one before; none without a recipe for it."""
    config = run.recipe.posttraining
    if config is None:
        return []
    start = context.student(run.recipe.seeds[0])
    described = to_json(config)
    task = {name: described[name] for name in ("task", "problems")}

    def stage(name: str, parts: tuple[str, ...], inputs: tuple[str, ...], work: Any) -> Stage:
        return Stage(
            name=name,
            command=name,
            recipe=task | {part: described[part] for part in parts},
            inputs=(CORPUS, *inputs),
            work=lambda place: work(run, config, place),
        )

    return [
        stage(SFT, ("sft", "sft_train", "replay"), (start,), _sft),
        stage(REJECTION, ("sft", "replay", "rejection", "rejection_train"), (SFT,), _rejection),
        stage(DPO, ("rejection", "dpo", "dpo_train"), (REJECTION,), _dpo),
    ]


def _problems(config: PostTrainingConfig) -> tuple[posttraining.Task, list[posttraining.Problem]]:
    task = posttraining.load_task(config.task)
    return task, list(task.train[: config.problems])


def _fine_tuning_rows(
    run: Run, config: PostTrainingConfig, conversations: Sequence[Any]
) -> list[posttraining.Record]:
    """Rows of the conversations, and as many of the corpus as `replay` asks for."""
    rows = posttraining.sft_rows(run.tokenizer, conversations, config.sft)
    return posttraining.with_replay(rows, run.corpus("train"), config.replay)


def _train(
    run: Run,
    place: epath.Path,
    model: models.Model,
    loss_fn: training.LossFn,
    rows: Sequence[Any],
    config: training.TrainConfig,
) -> dict[str, Any]:
    """Trains on a few rows: a set smaller than a batch is repeated whole until it fills one."""
    repeats = -(-config.batch_rows // len(rows))
    figures = run.train(place, model, loss_fn, [*rows] * repeats, config)
    if parallel.is_main():
        run.chat_tokenizer().save(place)
    return {"rows": len(rows), **figures}


def _sft(run: Run, config: PostTrainingConfig, place: epath.Path) -> dict[str, Any]:
    model = run.load(context.student(run.recipe.seeds[0]))
    _, problems = _problems(config)
    rows = _fine_tuning_rows(run, config, posttraining.demonstrations(problems))
    loss_fn = sft_loss(config, model.config, run.mesh)
    return _train(run, place, model, loss_fn, rows, config.sft_train)


def _rejection(run: Run, config: PostTrainingConfig, place: epath.Path) -> dict[str, Any]:
    model = run.load(SFT)
    task, problems = _problems(config)
    figures = posttraining.write_samples(
        place / "samples", model, run.tokenizer, task, problems, config.rejection
    )
    records = posttraining.read_samples(place / "samples")
    examples = posttraining.chosen_examples(run.tokenizer, records, config.rejection.template)
    if not examples:
        raise InputError(
            f"{place}: no sample of {figures['samples']} was good enough to choose; train longer "
            "before, draw more samples, or lower posttraining.rejection.threshold"
        )
    rows = _fine_tuning_rows(run, config, examples)
    loss_fn = _sft_loss(config, model.config, run.mesh, config.rejection_train)
    return {**figures, **_train(run, place, model, loss_fn, rows, config.rejection_train)}


def _dpo(run: Run, config: PostTrainingConfig, place: epath.Path) -> dict[str, Any]:
    model = run.load(REJECTION)
    records = posttraining.read_samples(run.directory / REJECTION / "samples")
    pairs = posttraining.sampled_pairs(run.tokenizer, records, config.rejection.template)
    if not pairs:
        raise InputError(
            f"{run.directory / REJECTION}: no problem has both a right and a wrong answer; draw "
            "more samples, or raise posttraining.rejection.temperature"
        )
    rows = posttraining.pair_rows(pairs, config.dpo, pad_id=run.tokenizer.pad_id)
    rows = posttraining.with_reference(model, rows, config.dpo)
    loss_fn = dpo_loss(config, model.config, run.mesh)
    return _train(run, place, model, loss_fn, rows, config.dpo_train)


def sft_loss(config: PostTrainingConfig, shape: models.LlamaConfig, mesh: Mesh) -> training.LossFn:
    """The loss of the stage sft, for a model of this shape on a mesh."""
    return _sft_loss(config, shape, mesh, config.sft_train)


def _sft_loss(
    config: PostTrainingConfig,
    shape: models.LlamaConfig,
    mesh: Mesh,
    train: training.TrainConfig,
) -> training.LossFn:
    return posttraining.sft_loss(
        shape, config.sft, remat=train.remat, compute_dtype=train.compute_dtype, mesh=mesh
    )


def dpo_loss(config: PostTrainingConfig, shape: models.LlamaConfig, mesh: Mesh) -> training.LossFn:
    """The loss of the stage dpo, for a model of this shape on a mesh."""
    train = config.dpo_train
    return posttraining.dpo_loss(
        shape, config.dpo, remat=train.remat, compute_dtype=train.compute_dtype, mesh=mesh
    )
