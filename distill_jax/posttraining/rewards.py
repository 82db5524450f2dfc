"""Rewards: how good an answer is, by a program, a model, or a function of the user's own."""

import math
import os
import re
import runpy
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from distill_jax import parallel
from distill_jax.artifacts import InputError, resolve
from distill_jax.data import Tokenizer
from distill_jax.models import Model, Reading
from distill_jax.posttraining.chat import (
    Example,
    Message,
    encode_answer,
    encode_prompt,
    end_of_turn,
)
from distill_jax.posttraining.log_probs import sequence_log_probs
from distill_jax.posttraining.rows import filled_batches, to_record
from distill_jax.posttraining.tasks import Problem, Scorer, score_number, score_text, to_messages
from distill_jax.training import values_of_rows

Reward = Callable[[Sequence[Sequence[Message]], Sequence[str], Sequence[str]], Sequence[float]]
"""(prompts, completions, references) -> scores, higher is better; one of each an answer.

A prompt is the conversation that waits for an answer; a reference is the right answer as the data
have it, or "" where they have none.
"""

Judge = Callable[[Sequence[Problem], Sequence[str]], Sequence[float]]
"""(problems, completions) -> scores, one of each an answer."""


def exact(completion: str, problem: Problem) -> float:
    """1 if the answer is the right one to the letter, but for space around it."""
    return float(completion.strip() == problem.answer.strip())


def matches(completion: str, problem: Problem) -> float:
    """1 if the regular expression that stands for the right answer is found in the answer."""
    return float(re.search(problem.answer, completion) is not None)


VERIFIERS: Mapping[str, Scorer] = {
    "exact": exact,
    "text": score_text,
    "number": score_number,
    "regex": matches,
}
"""Programs that compare an answer with its reference, by the name a recipe gives them."""


def by_program(scorer: Scorer) -> Judge:
    """Judges every answer by itself."""
    return lambda problems, completions: list(map(scorer, completions, problems))


def by_reward(reward: Reward) -> Judge:
    """Judges all answers at once, knowing of a problem its conversation and its reference."""
    return lambda problems, completions: reward(
        [to_messages(problem) for problem in problems],
        list(completions),
        [problem.answer for problem in problems],
    )


def load_function(name: str) -> Reward:
    """The function that `name`, "path/to/file.py:function", stands for.

    Raises:
      InputError: there is no such file or function, or the file fails.
    """
    path, _, function = name.rpartition(":")
    try:
        found = runpy.run_path(os.fspath(resolve(path))).get(function)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{path}: {_told(error)}") from error
    if not callable(found):
        raise InputError(f"{path}: has no function {function!r}")
    return found


def log_likelihood(
    model: Model, tokenizer: Tokenizer, template: str | None = None, **options: Any
) -> Reward:
    """How likely a model, a teacher, finds an answer: the mean of log p over its tokens.

    The end of the turn is one of them. Answers are tokenised anew. `options` are `by_model`'s.
    """

    def of_rows(params: Any, row: Mapping[str, Array], reading: Reading) -> Array:
        log_probs_B = sequence_log_probs(model.config, params, row, reading=reading)
        return log_probs_B / jnp.sum(row["where"], axis=-1)

    return by_model(model, of_rows, tokenizer, template, **options)


def by_model(
    model: Model,
    of_rows: Callable[[Any, Mapping[str, Array], Reading], Array],
    tokenizer: Tokenizer,
    template: str | None,
    *,
    rows_per_batch: int = 8,
    compute_dtype: str = "float32",
    mesh: Mesh | None = None,
) -> Reward:
    """A reward from what a model gives to rows of one answer each.

    Args:
      model: what judges.
      of_rows: (params, row, reading) -> [B] of a row [B, T], whose "where" is on the answer and
        the token that ends it.
      tokenizer: its tokenizer.
      template: of the conversations.
      rows_per_batch: answers in one forward pass, on each device of a mesh.
      compute_dtype: type of the computation.
      mesh: where the model lies: every device judges answers of its own.
    """
    end = end_of_turn(tokenizer, template)
    jitted = values_of_rows(model.config, of_rows, compute_dtype=compute_dtype, mesh=mesh)

    def reward(
        prompts: Sequence[Sequence[Message]], completions: Sequence[str], references: Sequence[str]
    ) -> list[float]:
        del references
        examples = []
        for messages, completion in zip(prompts, completions, strict=True):
            prompt = encode_prompt(tokenizer, messages, template)
            answer = [*tokenizer.encode(completion), end]
            if completion.strip():  # a template takes no empty answer, a model may give one
                answer = encode_answer(tokenizer, messages, completion, template, ended=True)
            where = [False] * len(prompt) + [True] * len(answer)
            examples.append(Example([*prompt, *answer], where))
        # Few lengths and one number of rows, so that little is compiled.
        length = 1 << max(len(example.tokens) - 1 for example in examples).bit_length()
        found: list[float] = []
        rows = [to_record([example], length) for example in examples]
        for part, batch in filled_batches(rows, rows_per_batch, mesh):
            found += parallel.to_host(jitted(model.params, batch))[: len(part)].tolist()
        return found

    return reward


def _told(error: BaseException) -> str:
    """An error of somebody else's code in a line, with the place it came from."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message} ({last.filename}, line {last.lineno})"


def judge(
    name: str, of: Judge, problems: Sequence[Problem], completions: Sequence[str]
) -> list[float]:
    """The scores that a judge, called `name`, gives to answers, one a problem.

    Raises:
      InputError: it fails, or gives other than one finite number an answer; the message has its
        name.
    """
    try:
        scores = [float(one) for one in of(problems, completions)]
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # a user's function
        raise InputError(f"reward {name}: {_told(error)}") from error
    if len(scores) != len(problems):
        raise InputError(f"reward {name}: {len(scores)} scores of {len(problems)} answers")
    for one, problem, completion in zip(scores, problems, completions, strict=True):
        if not math.isfinite(one):
            raise InputError(
                f"reward {name}: the score of {completion!r} to {problem.prompt!r} is {one}"
            )
    return scores
