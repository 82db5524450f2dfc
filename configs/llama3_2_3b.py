"""Llama 3.1 8B -> Llama 3.2 3B: the recipe of the 1B beside this file, with the 3B's shape."""

import dataclasses
import pathlib
from typing import Literal

from distill_jax.models import presets
from distill_jax.recipe import Recipe, load_recipe


def get_config(tokens: Literal["1B", "100B"] = "100B") -> Recipe:
    one_b = pathlib.Path(__file__).with_name("llama3_2_1b.py")
    recipe = load_recipe(one_b, [f"tokens={tokens}"])
    prune = dataclasses.replace(recipe.prune, target=presets.LLAMA_3_2_3B)
    return dataclasses.replace(recipe, name=f"llama3_2_3b-{tokens}", prune=prune)
