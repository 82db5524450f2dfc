"""teachers and targets: models that know better, and what they say about every training token."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from distill_jax import losses, models, parallel, teachers, training
from distill_jax.artifacts import InputError, fingerprint_path, resolve
from distill_jax.pipeline import Stage
from distill_jax.recipe import TeacherConfig, to_json
from distill_jax.stages import context
from distill_jax.stages.context import CORPUS, Run


def stages(run: Run) -> list[Stage]:
    """Two stages a teacher: its parameters, then its stored targets, if anybody reads such.

    Raises:
      InputError: there is nothing to reuse where the recipe says.
    """
    made = []
    # Where a row's targets come from changes nothing about them.
    recipe = to_json(run.recipe.targets)
    recipe.pop("reuse")
    reused = _earlier_stores(run)
    for name, config in run.recipe.teachers.items():
        inputs = (CORPUS,) if config.teacher is None else (CORPUS, context.teacher(config.teacher))
        external = {config.source: fingerprint_path(config.source)} if config.source else {}
        made.append(
            Stage(
                name=context.teacher(name),
                command="teachers",
                recipe=to_json(config),
                inputs=inputs,
                external=external,
                work=functools.partial(_make_teacher, run, config),
            )
        )
        if name in context.stored_teachers(run.recipe):
            made.append(
                Stage(
                    name=context.targets(name),
                    command="targets",
                    recipe=recipe,
                    inputs=(CORPUS, context.teacher(name)),
                    work=functools.partial(_write_targets, run, name, reused.get(name, {})),
                )
            )
    return made


def _make_teacher(run: Run, config: TeacherConfig, place: epath.Path) -> dict[str, Any]:
    if config.source is not None:
        shape = models.load_config(config.source)
        model = models.load(config.source, shardings=run.shardings(shape))
    elif config.teacher is not None:
        model = run.load(context.teacher(config.teacher))
    else:
        assert config.shape is not None  # TeacherConfig gives one of the three
        seed = config.train.seed if config.train else 0
        shape = dataclasses.replace(config.shape, vocab_size=run.tokenizer.vocab_size)
        model = run.init(shape, seed)
    figures: dict[str, Any] = {"parameters": model.config.parameters}
    if config.train is None:
        run.save(place, model)
        return figures
    loss_fn = training.language_model_loss(
        model.config,
        losses.weighted_sum(hard=(1.0, losses.hard_labels())),
        remat=config.train.remat,
        compute_dtype=config.train.compute_dtype,
        mesh=run.mesh,
    )
    return figures | run.train(place, model, loss_fn, run.corpus("train"), config.train)


def _earlier_stores(run: Run) -> dict[str, dict[str, list[epath.Path]]]:
    """Teacher -> scheme -> the finished stores that the recipe's `reuse` has of them."""
    reuse = run.recipe.targets.reuse
    if reuse is None:
        return {}
    place = resolve(reuse)
    if place.resolve() == run.directory.resolve():
        raise InputError(
            f"targets.reuse: {reuse} is this run's own directory, where targets are written anew; "
            "use another --out"
        )
    found = {
        name: {
            scheme: [place / context.targets(name) / scheme]
            for scheme in run.recipe.targets.schemes
            if (place / context.targets(name) / scheme / teachers.MANIFEST).exists()
        }
        for name in context.stored_teachers(run.recipe)
    }
    if not any(found.values()):
        raise InputError(f"targets.reuse: {reuse} has no finished store of the recipe's teachers")
    return found


def _write_targets(
    run: Run, name: str, reuse: Mapping[str, Sequence[epath.Path]], place: epath.Path
) -> dict[str, Any]:
    targets = run.recipe.targets
    return teachers.write_stores(
        {scheme: place / scheme for scheme in targets.schemes},
        targets.schemes,
        run.load(context.teacher(name)),
        run.corpus("train"),
        temperature=targets.temperature,
        config=targets.write,
        sharding=parallel.batch_sharding(run.mesh, split_time=True),
        reuse=reuse,
    )
