"""Questions that a program can check: digits to be sorted."""

import hashlib
import itertools
import json
import random
from collections.abc import Sequence

from etils import epath

from distill_jax import artifacts, posttraining
from distill_jax.artifacts import InputError

SPLITS = {"train": range(10), "tuning": range(10, 13), "held_out": range(13, 16)}
"""Sixteenths of all questions, by a hash: no seed and no order moves one into another split."""
VERIFIER = "number"
_ASKED = "Sort {digits}"


def questions(split: str, count: int, digits: int, seed: int) -> list[posttraining.Problem]:
    """So many of a split, in the order in which the seed draws them, none twice.

    Raises:
      InputError: there are not as many, or hardly.
    """
    rng, found = random.Random(f"{split} {seed}"), dict[str, posttraining.Problem]()
    tries = itertools.count()
    while len(found) < count:
        if next(tries) > 100 * count + 1000:
            raise InputError(f"of {digits} digits there are no {count} questions for {split}")
        number = "".join(rng.choices("123456789", k=digits))
        if _sixteenth(number) in SPLITS[split]:
            problem = posttraining.Problem(
                prompt=_ASKED.format(digits=number), answer="".join(sorted(number))
            )
            found[problem.prompt] = problem
    return list(found.values())


def _sixteenth(number: str) -> int:
    return hashlib.sha256(number.encode()).digest()[0] % 16


def write(path: epath.Path, problems: Sequence[posttraining.Problem]) -> str:
    """Leaves questions with their answers as JSON lines; returns the file's name for a recipe."""
    conversations = (posttraining.to_messages(one, one.answer) for one in problems)
    lines = (json.dumps({"messages": messages}) + "\n" for messages in conversations)
    path.parent.mkdir(parents=True, exist_ok=True)
    artifacts.write_bytes(path, "".join(lines).encode())
    return str(path)
