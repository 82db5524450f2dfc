"""The very programs that a recipe's stages run, on arrays that are only described.

Nothing is built here that a stage builds otherwise: functions come from where the stages get them,
and the shapes of a batch from the code that makes batches.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from distill_jax import data, models, parallel, posttraining, teachers, training
from distill_jax.artifacts import InputError
from distill_jax.planning.cuts import prune_programs
from distill_jax.planning.program import (
    ONE_DOCUMENT,
    Choice,
    Program,
    Stage,
    described,
    rows_at_a_time,
)
from distill_jax.planning.rollouts import Writing, on_policy_record
from distill_jax.planning.shapes import placed_params, student_shape, teacher_shape
from distill_jax.posttraining.rows import to_record
from distill_jax.recipe import PostTrainingConfig, Recipe
from distill_jax.stages import posttraining as stages_of_posttraining
from distill_jax.stages import students
from distill_jax.stages.context import stored_teachers
from distill_jax.teachers.rows import inputs


def stage_programs(
    recipe: Recipe,
    stage: Stage,
    choice: Choice,
    devices: Sequence[Any],
    *,
    teacher: str | None = None,
) -> list[Program]:
    """What a stage runs over and over on devices that need not be there.

    Args:
      recipe: the run. Of files that are not here only the names are looked at.
      stage: which stage.
      choice: what is decided otherwise.
      devices: such as those of a `parallel.Topology`.
      teacher: whose targets are written; None: the largest teacher's.

    Raises:
      InputError: a mesh or a number of rows that does not divide, a teacher whose shape is not
        known, or a recipe without post-training.
    """
    mesh = parallel.make_mesh(choice.mesh or recipe.mesh, devices)
    make: Mapping[Stage, Callable[[Recipe, Choice, Mesh], list[Program]]] = {
        "distill": _distill,
        "targets": functools.partial(_targets, teacher=teacher),
        "prune": prune_programs,
        "sft": _sft,
        "on-policy": _on_policy,
        "dpo": _dpo,
    }
    return make[stage](recipe, choice, mesh)


def _distill(recipe: Recipe, choice: Choice, mesh: Mesh) -> list[Program]:
    train = _chosen(recipe.distill.train, choice, mesh, "distill.train")
    shape, notes = student_shape(recipe)
    length = recipe.corpus.sequence_length
    record, live = _corpus_row(length), {}
    for name in recipe.distill.teachers(live=True):
        live[name], assumed = teacher_shape(recipe, name)
        notes += tuple(note for note in assumed if note not in notes)
    stored = {
        name: teachers.blank_row(
            recipe.targets.schemes[recipe.store(name)], length, shape.vocab_size
        )
        for name in recipe.distill.teachers(live=False)
    }
    if stored:
        ids = ", ".join(f"{name} {arrays['ids'].shape[-1]}" for name, arrays in stored.items())
        notes += (f"stored ids of a token are as many as their scheme can keep: {ids}",)
        record |= {"targets": stored}
    changed = dataclasses.replace(recipe, distill=dataclasses.replace(recipe.distill, train=train))
    program = _training(
        "distill",
        shape,
        students.distill_loss(changed, "distill", shape, mesh, live),
        record,
        train,
        mesh,
        context=length,
        live=live,
    )
    return [_finished(program, recipe.distill.train, (*notes, ONE_DOCUMENT))]


def _sft(recipe: Recipe, choice: Choice, mesh: Mesh) -> list[Program]:
    recipe_config = _posttraining(recipe)
    if recipe_config.sft_train is None:
        raise InputError("posttraining.sft_train: the recipe has none")
    train = _chosen(recipe_config.sft_train, choice, mesh, "posttraining.sft_train")
    config = dataclasses.replace(recipe_config, sft_train=train)
    shape, notes = student_shape(recipe)
    length = config.sft.sequence_length
    loss_fn = stages_of_posttraining.sft_loss(config, shape, mesh)
    record = to_record([], length)
    program = _training("sft", shape, loss_fn, record, train, mesh, context=length)
    return [_finished(program, recipe_config.sft_train, (*notes, ONE_DOCUMENT))]


def _on_policy(recipe: Recipe, choice: Choice, mesh: Mesh) -> list[Program]:
    recipe_config = _posttraining(recipe)
    own, asked = recipe_config.on_policy_train, recipe_config.on_policy
    if own is None:
        raise InputError("posttraining.on_policy_train: the recipe has none")
    assert asked.teacher is not None  # PostTrainingConfig checks that
    train = _chosen(own, choice, mesh, "posttraining.on_policy_train")
    shape, notes = student_shape(recipe)
    taught, assumed = teacher_shape(recipe, asked.teacher)
    notes += tuple(note for note in assumed if note not in notes)
    text = recipe.corpus.sequence_length
    beside = {posttraining.CONVERSATIONS: asked.sequence_length, posttraining.TEXT: text}
    step = _training(
        "on-policy",
        shape,
        stages_of_posttraining.on_policy_loss(
            dataclasses.replace(recipe_config, on_policy_train=train), shape, taught, mesh
        ),
        on_policy_record(asked, text),
        train,
        mesh,
        context=asked.sequence_length,
        live={posttraining.TEACHER: taught},
    )
    others = sum(
        3 * shape.flops_per_token(beside[name]) * beside[name] * step.rows for name in asked.beside
    )
    learns = _finished(
        dataclasses.replace(step, flops=step.flops + others), own, (*notes, ONE_DOCUMENT)
    )
    waiting = {"training": (step.held["parameters"], step.held["optimizer"])}
    writes = Writing(shape, taught, asked, own, choice, mesh, waiting, notes)
    return [*writes.programs(), learns]


def _dpo(recipe: Recipe, choice: Choice, mesh: Mesh) -> list[Program]:
    recipe_config = _posttraining(recipe)
    if recipe_config.dpo_train is None:
        raise InputError("posttraining.dpo_train: the recipe has none")
    train = _chosen(
        recipe_config.dpo_train, choice, mesh, "posttraining.dpo_train", split_time=False
    )
    config = dataclasses.replace(recipe_config, dpo_train=train)
    shape, notes = student_shape(recipe)
    (record,) = posttraining.pair_rows([posttraining.Pair([0], [1], [2])], config.dpo)
    record |= {"reference_log_probs": np.zeros(2, np.float32)}
    loss_fn = stages_of_posttraining.dpo_loss(config, shape, mesh)
    length = config.dpo.sequence_length
    program = _training(
        "dpo", shape, loss_fn, record, train, mesh, context=length, split_time=False
    )
    return [_finished(program, recipe_config.dpo_train, (*notes, "a row holds two answers"))]


def _training(
    name: str,
    shape: models.LlamaConfig,
    loss_fn: training.LossFn,
    record: Mapping[str, Any],
    train: training.TrainConfig,
    mesh: Mesh,
    *,
    context: int,
    live: Mapping[str, models.LlamaConfig] | None = None,
    split_time: bool = True,
) -> Program:
    """The step of `training.train` on rows like `record`, in which tokens see up to `context`."""
    params, axes = models.abstract_params(shape), models.logical_axes(shape)
    held = {n: placed_params(one, mesh, train.compute_dtype) for n, one in (live or {}).items()}
    frozen = (held,) if held else ()
    taught = sum(one.flops_per_token(context) for one in (live or {}).values())
    jitted = training.jit_step(params, axes, loss_fn, train, mesh, *frozen, split_time=split_time)
    shards = parallel.row_shards(mesh, split_time=split_time)
    batch = _batch(record, train.batch_rows, jitted.rows)
    tokens = batch["tokens"].size
    state = jitted.state
    return Program(
        name=name,
        lower=lambda: jitted.function.lower(state, batch, *frozen),
        held={
            "parameters": state.params,
            "optimizer": state.opt_state,
            "teachers": held,
            "batch": batch,
        },
        mesh=mesh,
        rows=train.batch_rows,
        batch=train.batch_rows // train.accumulation // shards,
        remat=train.remat,
        tokens=tokens,
        flops=(3 * shape.flops_per_token(context) + taught) * tokens,
    )


def _finished(program: Program, train: training.TrainConfig, notes: tuple[str, ...]) -> Program:
    """With the tokens of the recipe's own run, whatever was chosen otherwise."""
    row = program.tokens / program.rows
    total = train.steps * train.batch_rows * row
    if program.rows != train.batch_rows:
        notes += (
            f"a batch has {program.rows} rows, the recipe's {train.batch_rows}: to learn the same, "
            "change accumulation with it",
        )
    if options := parallel.compiler_options(program.mesh):
        named = ", ".join(f"{name}={value}" for name, value in options.items())
        notes += (f"compiled with {named}",)
    return dataclasses.replace(program, total_tokens=total, notes=notes)


def _targets(recipe: Recipe, choice: Choice, mesh: Mesh, *, teacher: str | None) -> list[Program]:
    shapes = {name: teacher_shape(recipe, name) for name in stored_teachers(recipe)}
    if not shapes:
        raise InputError("targets: of no teacher any are stored")
    if teacher is None:
        teacher = max(shapes, key=lambda name: shapes[name][0].parameters)
    if teacher not in shapes:
        raise InputError(f"--teacher: {teacher!r} is none of {', '.join(shapes)}")
    shape, notes = shapes[teacher]
    config, length = recipe.targets, recipe.corpus.sequence_length
    rows = rows_at_a_time(
        config.write.batch_rows, choice, mesh, "targets.write.batch_rows", split_time=True
    )
    sharding = parallel.batch_sharding(mesh, split_time=True)
    asking: Any = teachers.asking_of(
        shape, config.schemes, config.temperature, config.write, sharding
    )
    identity = teachers.Identity(
        teacher="",
        tokenizer="",
        corpus="",
        rows=1,
        rows_per_shard=1,
        sequence_length=length,
        vocab_size=shape.vocab_size,
        temperature=config.temperature,
        scheme=next(iter(config.schemes.values())),
    )
    batch = tuple(described(one[0], rows, sharding) for one in inputs(None, 1, identity))
    params = placed_params(shape, mesh)
    known = recipe.corpus.train_rows
    return [
        Program(
            name=f"targets {teacher}",
            lower=lambda: asking.func.lower(params, *batch, **asking.keywords),
            held={"parameters": params, "batch": batch},
            mesh=mesh,
            rows=rows,
            batch=rows // parallel.row_shards(mesh, split_time=True),
            tokens=rows * length,
            flops=shape.flops_per_token(length) * rows * length,
            total_tokens=None if known is None else float(known) * length,
            notes=(*notes, ONE_DOCUMENT),
        )
    ]


def _posttraining(recipe: Recipe) -> PostTrainingConfig:
    if recipe.posttraining is None:
        raise InputError("posttraining: the recipe has none")
    return recipe.posttraining


def _chosen(
    train: training.TrainConfig,
    choice: Choice,
    mesh: Mesh,
    field: str,
    *,
    split_time: bool = True,
) -> training.TrainConfig:
    rows = rows_at_a_time(
        train.batch_rows // train.accumulation,
        choice,
        mesh,
        f"{field}.batch_rows / accumulation",
        split_time=split_time,
    )
    return dataclasses.replace(
        train, batch_rows=rows * train.accumulation, remat=choice.remat or train.remat
    )


def _corpus_row(length: int) -> dict[str, Any]:
    tokens = np.zeros(length, np.int32)
    return {"row_id": 0, "key": "", "tokens": tokens, "segment_ids": tokens}


def _batch(record: Mapping[str, Any], rows: int, sharding: Any) -> Any:
    """What `data.batches` makes of such records, as ShapeDtypeStructs of `rows` rows."""
    return jax.tree.map(lambda leaf: described(leaf, rows, sharding), data.to_example(record))
