"""The very programs that a recipe's stages run, on arrays that are only described.

Nothing is built here that a stage builds otherwise: functions come from where the stages get them,
and the shapes of a batch from the code that makes batches.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from distill_jax import data, models, parallel, posttraining, pruning, teachers, training
from distill_jax.artifacts import InputError
from distill_jax.models.llama import Remat
from distill_jax.planning.shapes import placed_params, student_shape, teacher_shape
from distill_jax.posttraining.rows import to_record
from distill_jax.pruning import activations, surgery
from distill_jax.pruning.importance import random_scores
from distill_jax.recipe import PostTrainingConfig, Recipe
from distill_jax.stages import posttraining as stages_of_posttraining
from distill_jax.stages import students
from distill_jax.teachers.rows import inputs

Stage = Literal["distill", "targets", "prune", "sft", "dpo"]
"""The stages whose work grows with the model, the text and the slice."""

PARTS = ("embedding", "attention", "mlp", "head", "optimizer")
"""Named scopes of the programs, for which time is told apart."""

_ONE_DOCUMENT = "a row counts as one document: attention inside of shorter ones does less"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What may be decided otherwise than the recipe does, without changing what is learnt.

    Attributes:
      batch: rows at a time on each of the devices over which rows are split; None: the recipe's.
      remat: what the backward pass recomputes; None: the recipe's.
      mesh: the arrangement of the devices; None: the recipe's.
    """

    batch: int | None = None
    remat: Remat | None = None
    mesh: parallel.MeshConfig | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One jitted function of a stage and what it is called with.

    Attributes:
      name: the stage, and which of its programs.
      lower: traces it.
      held: its arguments by what they are: "parameters", "optimizer", "batch".
      mesh: its devices.
      rows: of a batch, over all devices.
      batch: rows on each of the devices over which they are split, at a time.
      remat: what the backward pass recomputes; "none" where there is none.
      tokens: of one execution.
      flops: of one execution by formula, without what is computed twice.
      kernel_share: share of the peak that Pallas calls are taken to reach.
      total_tokens: of all executions of the stage; None if the recipe does not say.
      notes: what was assumed.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    held: Mapping[str, Any]
    mesh: Mesh
    rows: int
    batch: int
    remat: Remat = "none"
    tokens: int
    flops: float
    kernel_share: float
    total_tokens: float | None = None
    notes: tuple[str, ...] = ()


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
        "prune": _prune,
        "sft": _sft,
        "dpo": _dpo,
    }
    return make[stage](recipe, choice, mesh)


def _distill(recipe: Recipe, choice: Choice, mesh: Mesh) -> list[Program]:
    train = _chosen(recipe.distill.train, choice, mesh, "distill.train")
    shape, notes = student_shape(recipe)
    length = recipe.corpus.sequence_length
    stored = {
        name: teachers.blank_row(
            recipe.targets.schemes[recipe.store(name)], length, shape.vocab_size
        )
        for name in recipe.distill.terms
    }
    ids = ", ".join(f"{name} {arrays['ids'].shape[-1]}" for name, arrays in stored.items())
    changed = dataclasses.replace(recipe, distill=dataclasses.replace(recipe.distill, train=train))
    program = _training(
        "distill",
        shape,
        students.distill_loss(changed, "distill", shape, mesh),
        _corpus_row(length) | {"targets": stored},
        train,
        mesh,
        context=length,
    )
    notes += (f"stored ids of a token are as many as their scheme can keep: {ids}", _ONE_DOCUMENT)
    return [_finished(program, recipe.distill.train, notes)]


def _sft(recipe: Recipe, choice: Choice, mesh: Mesh) -> list[Program]:
    recipe_config = _posttraining(recipe)
    train = _chosen(recipe_config.sft_train, choice, mesh, "posttraining.sft_train")
    config = dataclasses.replace(recipe_config, sft_train=train)
    shape, notes = student_shape(recipe)
    length = config.sft.sequence_length
    loss_fn = stages_of_posttraining.sft_loss(config, shape, mesh)
    record = to_record([], length)
    program = _training("sft", shape, loss_fn, record, train, mesh, context=length)
    return [_finished(program, recipe_config.sft_train, (*notes, _ONE_DOCUMENT))]


def _dpo(recipe: Recipe, choice: Choice, mesh: Mesh) -> list[Program]:
    recipe_config = _posttraining(recipe)
    train = _chosen(recipe_config.dpo_train, choice, mesh, "posttraining.dpo_train")
    config = dataclasses.replace(recipe_config, dpo_train=train)
    shape, notes = student_shape(recipe)
    (record,) = posttraining.pair_rows([posttraining.Pair([0], [1], [2])], config.dpo)
    record |= {"reference_log_probs": np.zeros(2, np.float32)}
    loss_fn = stages_of_posttraining.dpo_loss(config, shape, mesh)
    length = config.dpo.sequence_length
    program = _training("dpo", shape, loss_fn, record, train, mesh, context=length)
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
) -> Program:
    """The step of `training.train` on rows like `record`, in which tokens see up to `context`."""
    params, axes = models.abstract_params(shape), models.logical_axes(shape)
    jitted = training.jit_step(params, axes, loss_fn, train, mesh)
    batch = _batch(record, train.batch_rows, jitted.rows)
    tokens = batch["tokens"].size
    state = jitted.state
    return Program(
        name=name,
        lower=lambda: jitted.function.lower(state, batch),
        held={"parameters": state.params, "optimizer": state.opt_state, "batch": batch},
        mesh=mesh,
        rows=train.batch_rows,
        batch=train.batch_rows // train.accumulation // parallel.row_shards(mesh),
        remat=train.remat,
        tokens=tokens,
        flops=3 * shape.flops_per_token(context) * tokens,
        kernel_share=_kernel_share(shape),
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
    return dataclasses.replace(program, total_tokens=total, notes=notes)


def _targets(recipe: Recipe, choice: Choice, mesh: Mesh, *, teacher: str | None) -> list[Program]:
    shapes = {name: teacher_shape(recipe, name) for name in recipe.teachers}
    if teacher is None:
        teacher = max(shapes, key=lambda name: shapes[name][0].parameters)
    if teacher not in shapes:
        raise InputError(f"--teacher: {teacher!r} is none of {', '.join(shapes)}")
    shape, notes = shapes[teacher]
    config, length = recipe.targets, recipe.corpus.sequence_length
    rows = _rows(config.write.batch_rows, choice, mesh, "targets.write.batch_rows")
    sharding = parallel.batch_sharding(mesh)
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
    batch = tuple(_described(one[0], rows, sharding) for one in inputs(None, 1, identity))
    params = placed_params(shape, mesh)
    known = recipe.corpus.train_rows
    return [
        Program(
            name=f"targets {teacher}",
            lower=lambda: asking.func.lower(params, *batch, **asking.keywords),
            held={"parameters": params, "batch": batch},
            mesh=mesh,
            rows=rows,
            batch=rows // parallel.row_shards(mesh),
            tokens=rows * length,
            flops=shape.flops_per_token(length) * rows * length,
            kernel_share=_kernel_share(shape),
            total_tokens=None if known is None else float(known) * length,
            notes=(*notes, _ONE_DOCUMENT),
        )
    ]


def _prune(recipe: Recipe, choice: Choice, mesh: Mesh) -> list[Program]:
    """The scores of one calibration batch, and the cut."""
    source, notes = teacher_shape(recipe, recipe.pruned_teacher)
    if recipe.rounds:
        raise InputError("prune: of a recipe with rounds it cannot be planned yet")
    config, length = recipe.prune, recipe.corpus.sequence_length
    target = dataclasses.replace(config.target, vocab_size=source.vocab_size)
    rows = _rows(recipe.evaluation.batch_rows, choice, mesh, "evaluation.batch_rows")
    params = placed_params(source, mesh)
    arrays: dict[str, Any] = {
        k: np.asarray(v, np.float32) for k, v in random_scores(source, 0).items()
    }
    scores = pruning.Scores(**arrays, method="", model="", rows="")
    plan = pruning.make_plan(scores, source, target, kv_choice=config.kv_choice)
    cut = surgery.jit_cut(plan, mesh)
    shared: Any = {
        "mesh": mesh,
        "rows": rows,
        "batch": rows // parallel.row_shards(mesh),
        "kernel_share": _kernel_share(source),
    }
    programs = []
    if config.method == "activation":
        tokens_BT = _described(np.zeros(length, np.int32), rows, parallel.batch_sharding(mesh))
        totals = jax.eval_shape(lambda: activations.zeros(source))
        scoring = functools.partial(
            activations.accumulate.lower, config=source, how=config.sequence_aggregation
        )
        programs.append(
            Program(
                name="prune scores",
                lower=lambda: scoring(totals, params, tokens_BT, tokens_BT),
                held={"parameters": params, "batch": (tokens_BT, tokens_BT)},
                tokens=rows * length,
                flops=source.flops_per_token(length) * rows * length,
                total_tokens=float(config.calibration_rows) * length,
                notes=(*notes, _ONE_DOCUMENT),
                **shared,
            )
        )
    note = "the repair and the other methods' scores are not planned; the cut moves memory only"
    programs.append(
        Program(
            name="prune cut",
            lower=lambda: cut.lower(params),
            held={"parameters": params},
            tokens=0,
            flops=0.0,
            total_tokens=None,
            notes=(*notes, note),
            **shared,
        )
    )
    return programs


def _kernel_share(shape: models.LlamaConfig) -> float:
    # A head of 64 channels fills half of a matrix unit, and attention waits for its exponentials.
    return 0.3 if shape.head_dim < 128 else 0.5


def _posttraining(recipe: Recipe) -> PostTrainingConfig:
    if recipe.posttraining is None:
        raise InputError("posttraining: the recipe has none")
    return recipe.posttraining


def _chosen(
    train: training.TrainConfig, choice: Choice, mesh: Mesh, field: str
) -> training.TrainConfig:
    rows = _rows(
        train.batch_rows // train.accumulation, choice, mesh, f"{field}.batch_rows / accumulation"
    )
    return dataclasses.replace(
        train, batch_rows=rows * train.accumulation, remat=choice.remat or train.remat
    )


def _rows(own: int, choice: Choice, mesh: Mesh, field: str) -> int:
    """Rows at a time of all devices."""
    shards = parallel.row_shards(mesh)
    if choice.batch is not None:
        return choice.batch * shards
    if own % shards:
        raise InputError(
            f"{field}: {own} rows at a time do not divide over {shards} devices; change it or the "
            f"mesh, or try --batch 1, which is {shards} rows"
        )
    return own


def _corpus_row(length: int) -> dict[str, Any]:
    tokens = np.zeros(length, np.int32)
    return {"row_id": 0, "key": "", "tokens": tokens, "segment_ids": tokens}


def _batch(record: Mapping[str, Any], rows: int, sharding: Any) -> Any:
    """What `data.batches` makes of such records, as ShapeDtypeStructs of `rows` rows."""
    return jax.tree.map(lambda leaf: _described(leaf, rows, sharding), data.to_example(record))


def _described(leaf: Any, rows: int, sharding: Any) -> jax.ShapeDtypeStruct:
    array = np.asarray(leaf)
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    return jax.ShapeDtypeStruct((rows, *array.shape), dtype, sharding=sharding)
