"""What can be known to be wrong before any work begins."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import data, losses, models, parallel, posttraining, pruning, teachers
from distill_jax.artifacts import InputError, resolve
from distill_jax.recipe import PostTrainingConfig, Recipe
from distill_jax.stages.context import stored_teachers


def check(recipe: Recipe) -> None:
    """Finds files that are missing, teachers that do not fit, and shapes that cannot be cut.

    Raises:
      InputError: one line that names the field.
    """
    for source in (recipe.corpus.source, recipe.corpus.out_of_domain):
        if source is not None:
            resolve(source)
    tokenizer = None
    vocab_size = recipe.tokenizer.vocab_size
    if recipe.tokenizer.source is not None:
        tokenizer = data.load_tokenizer(recipe.tokenizer.source)
        vocab_size = tokenizer.vocab_size
    assert vocab_size is not None  # TokenizerConfig gives one of the two
    shapes: dict[str, models.LlamaConfig] = {}
    for name, teacher in recipe.teachers.items():
        if teacher.source is not None:
            shapes[name] = models.load_config(teacher.source)
            _check_tokenizer(name, teacher.source, tokenizer)
        elif teacher.teacher is not None:
            shapes[name] = shapes[teacher.teacher]
        else:
            assert teacher.shape is not None  # TeacherConfig gives one of the three
            shapes[name] = dataclasses.replace(teacher.shape, vocab_size=vocab_size)
        if shapes[name].vocab_size < vocab_size:
            raise InputError(
                f"teachers.{name}: has {shapes[name].vocab_size} token ids, the tokenizer "
                f"{vocab_size}"
            )
    sizes = {name: shape.vocab_size for name, shape in shapes.items()}
    if len(set(sizes.values())) > 1:
        raise InputError(f"teachers: have vocabularies of different size: {sizes}")
    small = shapes[recipe.pruned_teacher]
    for cut in (*(one.prune for one in recipe.rounds), recipe.prune):
        large, small = small, dataclasses.replace(cut.target, vocab_size=small.vocab_size)
        pruning.check_shapes(large, small, kv_choice=cut.kv_choice)
    models.config_to_hugging_face(small)
    for field in recipe.trainings:
        _check_objective(recipe, field, small.vocab_size)
    _check_rows(recipe)
    if not all(recipe.prompts):
        raise InputError("prompts: one is empty; there is nothing to continue")
    for field, post in recipe.posttrainings.items():
        try:
            _check_posttraining(post, shapes, tokenizer, small)
        except InputError as error:
            if field == "posttraining":
                raise
            raise InputError(f"{field}: {error}") from error


def _check_posttraining(
    config: PostTrainingConfig,
    teachers: Mapping[str, models.LlamaConfig],
    tokenizer: data.Tokenizer | None,
    student: models.LlamaConfig,
) -> None:
    """What can be known of its task, lengths, template, reward and files."""
    if config.task is not None:
        posttraining.load_task(config.task)
    lengths = {
        "sft": config.sft.sequence_length if config.learns_rows else 0,
        "on_policy": config.on_policy.sequence_length if config.on_policy_train else 0,
        "reward_model": config.reward_model.sequence_length if config.reward_train else 0,
        "dpo": config.dpo.sequence_length if config.dpo_train else 0,
    }
    for field, length in lengths.items():
        if length > student.context:
            raise InputError(
                f"posttraining.{field}.sequence_length: {length} is more than the student's "
                f"context of {student.context} tokens"
            )
    if tokenizer is not None:
        posttraining.end_of_turn(tokenizer, config.rejection.template)
    if config.on_policy_train is not None:
        _check_on_policy(config.on_policy, teachers, student.vocab_size)
    if config.rejection_train is not None:
        _check_reward(config.rejection, teachers)
    posttraining.check_files(config, tokenizer)


def _check_on_policy(
    config: posttraining.OnPolicyConfig,
    teachers: Mapping[str, models.LlamaConfig],
    vocab_size: int,
) -> None:
    """There must be its teacher, whose context is long enough; its loss is traced."""
    assert config.teacher is not None  # PostTrainingConfig checks that
    if config.teacher not in teachers:
        raise InputError(
            f"posttraining.on_policy.teacher: {config.teacher!r} is none of the teachers "
            f"{', '.join(teachers)}"
        )
    context = teachers[config.teacher].context
    if config.sequence_length > context:
        raise InputError(
            f"posttraining.on_policy.sequence_length: {config.sequence_length} is more than the "
            f"context of {context} tokens that {config.teacher} has"
        )
    numbers = ("old_log_probs", "advantages", "weights")
    targets = {name: jnp.zeros(1) for name in numbers} | {"labels": jnp.zeros(1, jnp.int32)}
    targets[posttraining.TEACHER] = jnp.zeros((1, vocab_size))
    _trace(posttraining.on_policy_objective(config), targets, vocab_size, "posttraining.on_policy")


def _check_reward(config: posttraining.RejectionConfig, teachers: Collection[str]) -> None:
    if config.teacher is not None and config.teacher not in teachers:
        raise InputError(
            f"posttraining.rejection.reward: {config.teacher!r} is none of the teachers "
            f"{', '.join(teachers)}"
        )
    if config.function is not None:
        posttraining.load_function(config.function)


def _check_objective(recipe: Recipe, field: str, vocab_size: int) -> None:
    """Traces the loss on the kinds of targets that the recipe gives it."""
    stored = {
        "ids": jnp.zeros((1, 1), jnp.int32),
        "log_probs": jnp.zeros((1, 1)),
        "log_tail": jnp.zeros(1),
        "weights": jnp.ones((1, 1)),
        "entropy": jnp.zeros(1),
    }
    temperature = recipe.targets.temperature
    targets: dict[str, Any] = {"labels": jnp.zeros(1, jnp.int32)}
    for scheme in recipe.targets.schemes.values():
        scheme.columns(vocab_size)
    distill = recipe.trainings[field]
    targets |= {name: jnp.zeros((1, vocab_size)) for name in distill.teachers(live=True)}
    for name in distill.teachers(live=False):
        scheme = recipe.targets.schemes[recipe.store(name, field)]
        targets[name] = teachers.to_targets(scheme, stored, temperature=temperature)
    _trace(distill.objective(temperature), targets, vocab_size, f"{field}.terms")


def _trace(
    objective: losses.Objective, targets: Mapping[str, Any], vocab_size: int, field: str
) -> None:
    """Runs through an objective without computing anything."""
    logits = jax.ShapeDtypeStruct((1, vocab_size), jnp.float32)
    try:
        jax.eval_shape(lambda x: objective(x, targets), logits)
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{field}: {error}") from error


def _check_rows(recipe: Recipe) -> None:
    """There must be rows for a batch, and it must divide over the devices."""
    mesh = parallel.make_mesh(recipe.mesh)
    runs = {f"teachers.{name}.train": t.train for name, t in recipe.teachers.items() if t.train}
    runs |= {f"{field}.train": distill.train for field, distill in recipe.trainings.items()}
    available = recipe.corpus.train_rows
    for name, run in runs.items():
        if available is not None and available < run.batch_rows:
            raise InputError(
                f"{name}.batch_rows: a batch has {run.batch_rows} rows, "
                f"corpus.train_rows is {available}"
            )
    lengths = {"corpus.sequence_length": recipe.corpus.sequence_length}
    of_pairs: dict[str, Any] = {}
    for field, post in recipe.posttrainings.items():
        if post.learns_rows:
            lengths[f"{field}.sft.sequence_length"] = post.sft.sequence_length
        if post.on_policy_train is not None:
            lengths[f"{field}.on_policy.sequence_length"] = post.on_policy.sequence_length
        for name, train in post.trainings.items():
            kind = of_pairs if name in ("reward_train", "dpo_train") else runs
            kind[f"{field}.{name}"] = train
    _check_lengths(lengths, parallel.time_shards(mesh))
    shared = {"evaluation.batch_rows": recipe.evaluation.batch_rows} | _at_a_time(runs)
    if stored_teachers(recipe):
        shared["targets.write.batch_rows"] = recipe.targets.write.batch_rows
    for rows, split_time in ((shared, True), (_at_a_time(of_pairs), False)):
        _check_divide(rows, parallel.row_shards(mesh, split_time=split_time))


def _at_a_time(runs: dict[str, Any]) -> dict[str, int]:
    return {f"{name}.batch_rows": run.batch_rows // run.accumulation for name, run in runs.items()}


def _check_divide(rows: dict[str, int], shards: int) -> None:
    for name, count in rows.items():
        if count % shards:
            raise InputError(
                f"{name}: {count} rows at a time do not divide over {shards} devices; change it, "
                "or the mesh"
            )


def _check_lengths(lengths: dict[str, int], shards: int) -> None:
    for name, length in lengths.items():
        if shards > 1 and length % (2 * shards):
            raise InputError(
                f"{name}: {length} tokens do not divide into two parts for each of the {shards} "
                "devices of mesh.sequence; change one of them"
            )


def _check_tokenizer(name: str, source: str, tokenizer: data.Tokenizer | None) -> None:
    """Refuses a teacher that comes with another tokenizer; equal sizes do not make them equal."""
    place = resolve(source)
    has_own = place.is_file() or any(
        (place / file).exists() for file in ("tokenizer.json", "tokenizer.model")
    )
    if not has_own:
        return
    own = data.load_tokenizer(source).fingerprint
    if tokenizer is None or own != tokenizer.fingerprint:
        wanted = tokenizer.fingerprint if tokenizer else "one trained on the corpus"
        raise InputError(f"teachers.{name}: its tokenizer is {own}, the recipe's is {wanted}")
