"""Lets a model answer problems, and counts how many it gets right."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from jax.sharding import Sharding

from distill_jax import progress
from distill_jax.data import Tokenizer
from distill_jax.models import Model, Sampling, generate
from distill_jax.posttraining.chat import encode_prompt, end_of_turn
from distill_jax.posttraining.tasks import Problem, Task, to_messages


class Answer(NamedTuple):
    """What a model said to one problem.

    Attributes:
      text: the completion, decoded.
      tokens: its tokens, without the one that ends the turn.
      log_prob: sum of its tokens' log-probabilities under the model, the end of the turn included.
      finished: whether the model ended its turn itself.
    """

    text: str
    tokens: list[int]
    log_prob: float
    finished: bool


def seed_of(*parts: object) -> int:
    """A seed in [0, 2^31) that depends on `parts` alone, not on what else is being drawn."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def stop_ids(tokenizer: Tokenizer, template: str | None = None) -> tuple[int, ...]:
    """The tokens that end an answer, rising: the end of the turn, and that of the text.

    Raises:
      InputError: the template ends a turn in ordinary text.
    """
    ends = {end_of_turn(tokenizer, template), tokenizer.eos_id}
    return tuple(sorted(end for end in ends if end is not None))


def answer(
    model: Model,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    *,
    sampling: Sampling,
    seeds: Sequence[int],
    max_new_tokens: int,
    template: str | None = None,
    batch_rows: int = 32,
    sharding: Sharding | None = None,
) -> list[Answer]:
    """One answer to each problem, all generated together.

    Args:
      model: answers.
      tokenizer: the model's.
      problems: the questions; a problem that stands there twice is read once and answered twice.
      sampling: temperature and truncation.
      seeds: one a problem.
      max_new_tokens: where an answer that does not end is cut off.
      template: a chat template in place of the tokenizer's own.
      batch_rows: as in `generate`; so `sharding`.
      sharding: see `batch_rows`.

    Raises:
      InputError: the template ends a turn in ordinary text.
    """
    ends = stop_ids(tokenizer, template)
    completions = generate(
        model,
        [encode_prompt(tokenizer, to_messages(problem), template) for problem in problems],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seeds=list(seeds),
        stop_ids=ends,
        batch_rows=batch_rows,
        sharding=sharding,
    )
    answers = []
    for completion in completions:
        tokens = list(completion.tokens)
        if tokens and tokens[-1] in ends:
            tokens.pop()
        log_prob = float(sum(completion.log_probs))
        answers.append(Answer(tokenizer.decode(tokens), tokens, log_prob, completion.finished))
    return answers


def accuracy(
    model: Model,
    tokenizer: Tokenizer,
    task: Task,
    problems: Sequence[Problem] | None = None,
    *,
    max_new_tokens: int = 32,
    rows_per_batch: int = 256,
    template: str | None = None,
    sharding: Sharding | None = None,
) -> dict[str, float]:
    """How well a model does a task, answering greedily.

    Args:
      model: answers.
      tokenizer: the model's.
      task: scores the answers.
      problems: the questions; by default the task's held-out ones.
      max_new_tokens: where an answer that does not end is cut off.
      rows_per_batch: problems handed over at a time; as rows of `generate` end, others begin.
      template: a chat template in place of the tokenizer's own.
      sharding: as in `generate`.

    Returns:
      "accuracy", the mean score; "finished", the share of answers that ended; "problems".
    """
    problems = task.held_out if problems is None else problems
    scores: list[float] = []
    finished = 0
    with progress.bar(f"accuracy {task.name}", len(problems), unit="problems") as bar:
        for start in range(0, len(problems), rows_per_batch):
            batch = problems[start : start + rows_per_batch]
            answers = answer(
                model,
                tokenizer,
                batch,
                sampling=Sampling(temperature=0.0),
                seeds=[0] * len(batch),
                max_new_tokens=max_new_tokens,
                template=template,
                sharding=sharding,
            )
            scores += [task.score(said.text, p) for said, p in zip(answers, batch, strict=True)]
            finished += sum(said.finished for said in answers)
            bar.advance(len(batch), tokens=sum(len(said.tokens) for said in answers))
    count = max(len(problems), 1)
    return {
        "accuracy": sum(scores) / count,
        "finished": finished / count,
        "problems": len(problems),
    }
