"""prune, distill and the controls: from the teacher's parameters to a small model."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from etils import epath

from distill_jax import data, losses, models, pruning, teachers, training
from distill_jax.pipeline import Stage
from distill_jax.recipe import Control, to_json
from distill_jax.stages import context
from distill_jax.stages.context import CORPUS, PRUNE, Run


def stages(run: Run) -> list[Stage]:
    """The pruned start, then a student and its controls for every seed."""
    recipe = run.recipe
    prune = Stage(
        name=PRUNE,
        command="prune",
        recipe=to_json(recipe.prune) | {"batch_rows": recipe.evaluation.batch_rows},
        inputs=(CORPUS, context.teacher(recipe.pruned_teacher)),
        work=lambda place: _prune(run, place),
    )
    stored = tuple(context.targets(name) for name in recipe.distill.terms)
    described = to_json(recipe.distill)
    # Controls without teachers do not depend on how teachers are weighed.
    inputs: Mapping[Control, tuple[str, ...]] = {
        "cross_entropy": (CORPUS, PRUNE),
        "random_start": (CORPUS, PRUNE, *stored),
    }
    descriptions: Mapping[Control, Any] = {
        "cross_entropy": {"train": described["train"]},
        "random_start": {"distill": described},
    }
    made = [prune]
    for seed in recipe.seeds:
        made.append(
            Stage(
                name=context.student(seed),
                command="distill",
                recipe={"distill": described, "seed": seed},
                inputs=(CORPUS, PRUNE, *stored),
                work=functools.partial(_distill, run, seed),
            )
        )
        for kind in recipe.controls:
            made.append(
                Stage(
                    name=context.control(kind, seed),
                    command="distill",
                    recipe={**descriptions[kind], "seed": seed},
                    inputs=inputs[kind],
                    work=functools.partial(_CONTROLS[kind], run, seed),
                )
            )
    return made


def _prune(run: Run, place: epath.Path) -> dict[str, Any]:
    recipe = run.recipe
    model = run.load(context.teacher(recipe.pruned_teacher))
    # A tokenizer that was trained on the corpus decides the vocabulary, the recipe cannot.
    target = dataclasses.replace(recipe.prune.target, vocab_size=model.config.vocab_size)
    corpus = run.corpus("train")
    pruned, figures = pruning.prune(
        model,
        data.batches(
            corpus,
            batch_rows=recipe.evaluation.batch_rows,
            seed=0,
            shuffle=False,
            epochs=1,
        ),
        dataclasses.replace(recipe.prune, target=target),
        place,
        mesh=run.mesh,
        tokenizer=corpus.tokenizer_fingerprint,
    )
    run.save(place, pruned)
    return figures


def _distill(run: Run, seed: int, place: epath.Path) -> dict[str, Any]:
    return _train_on_targets(run, seed, run.load(PRUNE), place)


def _random_start(run: Run, seed: int, place: epath.Path) -> dict[str, Any]:
    model = run.init(models.load_config(run.directory / PRUNE), seed)
    return _train_on_targets(run, seed, model, place)


def _cross_entropy(run: Run, seed: int, place: epath.Path) -> dict[str, Any]:
    model = run.load(PRUNE)
    train = dataclasses.replace(run.recipe.distill.train, seed=seed)
    objective = losses.weighted_sum(hard=(1.0, losses.hard_labels()))
    loss_fn = training.language_model_loss(
        model.config, objective, remat=train.remat, mesh=run.mesh
    )
    return run.train(place, model, loss_fn, run.corpus("train"), train)


_CONTROLS: Mapping[Control, Any] = {
    "cross_entropy": _cross_entropy,
    "random_start": _random_start,
}


def _train_on_targets(
    run: Run, seed: int, model: models.Model, place: epath.Path
) -> dict[str, Any]:
    """Trains on the text and the stored targets; no teacher is in memory."""
    recipe = run.recipe
    train = dataclasses.replace(recipe.distill.train, seed=seed)
    stores = {
        name: teachers.open_store(run.directory / context.targets(name) / recipe.store(name))
        for name in recipe.distill.terms
    }
    rows: data.RowSource = teachers.join(
        run.corpus("train"),
        stores,
        vocab_size=model.config.vocab_size,
        temperature=recipe.targets.temperature,
    )

    def teacher_targets(stored: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: teachers.to_targets(
                store.identity.scheme, stored[name], temperature=store.identity.temperature
            )
            for name, store in stores.items()
        }

    loss_fn = training.language_model_loss(
        model.config,
        recipe.distill.objective(recipe.targets.temperature),
        remat=train.remat,
        teacher_targets=teacher_targets,
        mesh=run.mesh,
    )
    return run.train(place, model, loss_fn, rows, train)
