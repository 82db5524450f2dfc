"""Recipes of post-training alone, and their stages."""

import dataclasses
import json
import pathlib

from distill_jax.recipe import Recipe, load_recipe
from distill_jax.stages import posttraining

TINY = pathlib.Path(__file__).parents[2] / "configs" / "tiny.py"


def recipe_of(*overrides) -> Recipe:
    settings = ["replay=0.0", "sft_train.steps=2", *overrides]
    return load_recipe(TINY, ["size=test", *(f"posttraining.{text}" for text in settings)])


def alone(*overrides) -> Recipe:
    """Fine-tuning on files alone."""
    return recipe_of("task=null", "rejection_train=null", "dpo_train=null", *overrides)


def conversation(question, answer):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns})


def works(run) -> dict:
    """The directory of each stage, as it is when work begins, and what fills it."""
    made = {}
    for stage in posttraining.stages(run):
        (run.directory / stage.name).mkdir(parents=True, exist_ok=True)
        made[stage.name] = (run.directory / stage.name, stage)
    return made


def two_rounds(**before) -> Recipe:
    """Fine-tuning, samples and preferences twice; changes to the first round."""
    recipe = recipe_of()
    first = dataclasses.replace(recipe.posttraining, **before)
    return dataclasses.replace(recipe, posttraining_rounds=(first,))
