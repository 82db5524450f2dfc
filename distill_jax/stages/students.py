"""prune, distill and the controls: from the teacher's parameters to a small model."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from etils import epath
from jax.sharding import Mesh

from distill_jax import data, losses, models, parallel, pipeline, pruning, teachers, training
from distill_jax.artifacts import InputError
from distill_jax.pipeline import Stage
from distill_jax.pruning import PruneConfig
from distill_jax.recipe import Control, DistillConfig, Recipe, to_json
from distill_jax.stages import context
from distill_jax.stages.context import CORPUS, PRUNE, Run


def stages(run: Run) -> list[Stage]:
    """Rounds on the way, the pruned start, then a student and its controls for every seed."""
    recipe = run.recipe
    made: list[Stage] = []
    source = context.teacher(recipe.pruned_teacher)
    for number, one in enumerate(recipe.rounds):
        start = context.round_start(number)
        made.append(_cut(run, start, context.ROUNDS, one.prune, source))
        source = context.round_student(number)
        field, seed = f"rounds.{number}.distill", one.distill.train.seed
        made.append(
            Stage(
                name=source,
                command=context.ROUNDS,
                recipe=_described(recipe, one.distill),
                inputs=(CORPUS, start, *_taught_by(one.distill)),
                work=functools.partial(_distill, run, field, seed, start),
            )
        )
    made.append(_cut(run, PRUNE, PRUNE, recipe.prune, source))
    taught_by = _taught_by(recipe.distill)
    described = _described(recipe, recipe.distill)
    # Controls without teachers do not depend on how teachers are weighed.
    inputs: Mapping[Control, tuple[str, ...]] = {
        "cross_entropy": (CORPUS, PRUNE),
        "random_start": (CORPUS, PRUNE, *taught_by),
    }
    descriptions: Mapping[Control, Any] = {
        "cross_entropy": {"train": described["distill"]["train"]},
        "random_start": described,
    }
    for seed in recipe.seeds:
        made.append(
            Stage(
                name=context.student(seed),
                command="distill",
                recipe={**described, "seed": seed},
                inputs=(CORPUS, PRUNE, *taught_by),
                work=functools.partial(_distill, run, "distill", seed, PRUNE),
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


def _cut(run: Run, name: str, command: str, config: PruneConfig, source: str) -> Stage:
    batch_rows = run.recipe.evaluation.batch_rows
    return Stage(
        name=name,
        command=command,
        recipe=to_json(config) | {"batch_rows": batch_rows},
        inputs=(CORPUS, source),
        work=functools.partial(_prune, run, config, source),
    )


def _described(recipe: Recipe, distill: DistillConfig) -> dict[str, Any]:
    """What of the recipe decides a training; the stores know their temperature themselves."""
    live = distill.teachers(live=True)
    temperature = {"temperature": recipe.targets.temperature} if live else {}
    return {"distill": to_json(distill), **temperature}


def _taught_by(distill: DistillConfig) -> tuple[str, ...]:
    """The stages that left the targets, and the teachers that run beside the student."""
    stored, live = (distill.teachers(live=live) for live in (False, True))
    return *map(context.targets, stored), *map(context.teacher, live)


def _prune(run: Run, config: PruneConfig, source: str, place: epath.Path) -> dict[str, Any]:
    model = run.load(source)
    # A tokenizer that was trained on the corpus decides the vocabulary, the recipe cannot.
    target = dataclasses.replace(config.target, vocab_size=model.config.vocab_size)
    corpus = run.corpus("train")
    pruned, figures = pruning.prune(
        model,
        data.batches(
            corpus,
            batch_rows=parallel.whole_batch(run.recipe.evaluation.batch_rows, run.mesh),
            seed=0,
            shuffle=False,
            epochs=1,
        ),
        dataclasses.replace(config, target=target),
        place,
        mesh=run.mesh,
        tokenizer=corpus.tokenizer_fingerprint,
    )
    run.save(place, pruned)
    return figures


def _distill(run: Run, field: str, seed: int, start: str, place: epath.Path) -> dict[str, Any]:
    return _train_by_teachers(run, field, seed, run.load(start), place)


def _random_start(run: Run, seed: int, place: epath.Path) -> dict[str, Any]:
    model = run.init(models.load_config(run.directory / PRUNE), seed)
    return _train_by_teachers(run, "distill", seed, model, place)


def _cross_entropy(run: Run, seed: int, place: epath.Path) -> dict[str, Any]:
    model = run.load(PRUNE)
    train = dataclasses.replace(run.recipe.distill.train, seed=seed)
    objective = losses.weighted_sum(hard=(1.0, losses.hard_labels()))
    loss_fn = training.language_model_loss(
        model.config, objective, remat=train.remat, compute_dtype=train.compute_dtype, mesh=run.mesh
    )
    return run.train(place, model, loss_fn, run.corpus("train"), train)


_CONTROLS: Mapping[Control, Any] = {
    "cross_entropy": _cross_entropy,
    "random_start": _random_start,
}


def _train_by_teachers(
    run: Run, field: str, seed: int, model: models.Model, place: epath.Path
) -> dict[str, Any]:
    """Trains on the text and what teachers say, as a field of the recipe says.

    Of the teachers only live ones are in memory.
    """
    recipe = run.recipe
    distill = recipe.trainings[field]
    train = dataclasses.replace(distill.train, seed=seed)
    corpus = run.corpus("train")
    rows: data.RowSource = corpus
    if stores := open_stores(run, field):
        rows = teachers.join(
            corpus,
            stores,
            vocab_size=model.config.vocab_size,
            temperature=recipe.targets.temperature,
        )
    live = {name: context.teacher(name) for name in distill.teachers(live=True)}
    shapes = {name: models.load_config(run.directory / stage) for name, stage in live.items()}
    loss_fn = distill_loss(recipe, field, model.config, run.mesh, shapes)
    return run.train(place, model, loss_fn, rows, train, live)


def open_stores(run: Run, field: str) -> dict[str, teachers.Store]:
    """The stores that a training, a key of `Recipe.trainings`, reads, by teacher.

    Raises:
      InputError: one is not finished or is damaged, keeps something else than the recipe says, or
        is of another teacher than the stage that wrote it says.
    """
    stores = {}
    for name, scheme in _stores(run.recipe, field).items():
        place = run.directory / context.targets(name)
        figures = pipeline.read_manifest(place)["figures"].get(scheme, {})
        store = teachers.open_store(place / scheme)
        written = figures.get("teacher", store.identity.teacher)  # early runs do not say
        if written != store.identity.teacher:
            raise InputError(
                f"teacher {name}: {store.directory} is of the teacher {store.identity.teacher}, "
                f"{place / pipeline.MANIFEST} of {written}"
            )
        wanted = run.recipe.targets.schemes[scheme]
        if store.scheme != wanted:
            raise InputError(
                f"teacher {name}: {store.directory} has {store.scheme}, the recipe {wanted}"
            )
        stores[name] = store
    return stores


def _stores(recipe: Recipe, field: str) -> dict[str, str]:
    """The names of the stores that a training reads, by teacher."""
    names = recipe.trainings[field].teachers(live=False)
    return {name: recipe.store(name, field) for name in names}


def distill_loss(
    recipe: Recipe,
    field: str,
    shape: models.LlamaConfig,
    mesh: Mesh,
    live: Mapping[str, models.LlamaConfig],
) -> training.LossFn:
    """The loss of a training by teachers.

    Args:
      recipe: whose stores are read.
      field: a key of `Recipe.trainings`.
      shape: of the student.
      mesh: where it is trained.
      live: the shapes of the teachers that run beside it.

    Raises:
      InputError: one of them has another vocabulary.
    """
    distill, temperature = recipe.trainings[field], recipe.targets.temperature
    stores = _stores(recipe, field)
    schemes = {name: recipe.targets.schemes[store] for name, store in stores.items()}

    def teacher_targets(stored: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: teachers.to_targets(scheme, stored[name], temperature=temperature)
            for name, scheme in schemes.items()
        }

    return training.language_model_loss(
        shape,
        distill.objective(temperature),
        remat=distill.train.remat,
        compute_dtype=distill.train.compute_dtype,
        teacher_targets=teacher_targets if schemes else None,
        live=live,
        mesh=mesh,
    )
