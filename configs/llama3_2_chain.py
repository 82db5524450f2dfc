"""Llama 3.1 8B -> 3B -> Llama 3.2 1B: the recipe of the 1B beside this file, by way of a 3B.

Most of the 8B's parameters at once are hard to recover from; here a 3B is cut and trained first,
and the 1B is cut from what it became. The teachers of both are the 8B and the 70B. The 3B on the
way has the shape of Llama 3.2's but for its 32 query heads: from the published 24, the 1B's 32
cannot be cut.
"""

import dataclasses
import pathlib
from typing import Literal

from distill_jax.models import presets
from distill_jax.recipe import Recipe, Round, load_recipe

BETWEEN = dataclasses.replace(presets.LLAMA_3_2_3B, heads=presets.LLAMA_3_2_1B.heads)


def get_config(tokens: Literal["1B", "100B"] = "100B") -> Recipe:
    one_b = pathlib.Path(__file__).with_name("llama3_2_1b.py")
    recipe = load_recipe(one_b, [f"tokens={tokens}"])
    to_3b = Round(prune=dataclasses.replace(recipe.prune, target=BETWEEN), distill=recipe.distill)
    return dataclasses.replace(recipe, name=f"llama3_2_chain-{tokens}", rounds=(to_3b,))
