"""The shapes of a recipe's models, whether or not their files are here."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from distill_jax import models, parallel
from distill_jax.artifacts import InputError, resolve
from distill_jax.models import presets
from distill_jax.pruning.steps import layer_shardings
from distill_jax.recipe import Recipe


def student_shape(recipe: Recipe) -> tuple[models.LlamaConfig, tuple[str, ...]]:
    """The student's shape with the teachers' vocabulary, and what was assumed."""
    target = recipe.prune.target
    if recipe.tokenizer.vocab_size is not None:
        return dataclasses.replace(target, vocab_size=recipe.tokenizer.vocab_size), ()
    try:
        source, notes = teacher_shape(recipe, recipe.pruned_teacher)
    except InputError:
        return target, ("the vocabulary is that of prune.target",)
    return dataclasses.replace(target, vocab_size=source.vocab_size), notes


def teacher_shape(recipe: Recipe, name: str) -> tuple[models.LlamaConfig, tuple[str, ...]]:
    """A teacher's shape, and what was assumed.

    Raises:
      InputError: the teacher is not here and its name speaks of no published shape.
    """
    teacher = recipe.teachers[name]
    if teacher.teacher is not None:
        return teacher_shape(recipe, teacher.teacher)
    if teacher.shape is not None:
        vocab_size = recipe.tokenizer.vocab_size or teacher.shape.vocab_size
        return dataclasses.replace(teacher.shape, vocab_size=vocab_size), ()
    assert teacher.source is not None  # TeacherConfig gives one of the three
    try:
        resolve(teacher.source)
    except InputError:
        known = presets.by_name(teacher.source)
        if known is None:
            raise InputError(
                f"teachers.{name}: {teacher.source} is not here, and its name speaks of no "
                "published shape"
            ) from None
        return known, (f"teacher {name} has the published shape that its name speaks of",)
    return models.load_config(teacher.source), ()


def known_teachers(recipe: Recipe) -> list[models.LlamaConfig | None]:
    """The shapes of the teachers, in the recipe's order; None of one that is not known."""
    found: list[models.LlamaConfig | None] = []
    for name in recipe.teachers:
        try:
            found.append(teacher_shape(recipe, name)[0])
        except InputError:
            found.append(None)
    return found


def placed_params(shape: models.LlamaConfig, mesh: Mesh, dtype: Any = jnp.float32) -> models.Params:
    """Parameters as `models.load` places them."""
    params = models.abstract_params(shape, dtype)
    shardings = parallel.shardings(mesh, models.logical_axes(shape), params)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, shardings
    )


def placed_layer(shape: models.LlamaConfig, mesh: Mesh) -> models.Params:
    """One layer of `placed_params`, as `pruning.steps.layer_at` places it."""
    layers = models.abstract_params(shape)["layers"]
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=s),
        layers,
        layer_shardings(shape, mesh),
    )
