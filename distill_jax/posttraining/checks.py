"""Reads a recipe's files through before any work begins."""

import collections
import functools
from collections.abc import Callable, Iterator
from typing import Any

from distill_jax.artifacts import InputError
from distill_jax.data import Rejects, Tokenizer
from distill_jax.posttraining.config import PostTrainingConfig
from distill_jax.posttraining.pairs import PairConfig
from distill_jax.posttraining.preferences import read_pairs, read_preferences
from distill_jax.posttraining.prompts import PromptConfig, check_length, read_problems
from distill_jax.posttraining.sft import read_examples
from distill_jax.posttraining.tasks import load_task

Reader = Callable[[Rejects], Iterator[Any]]


def check_files(config: PostTrainingConfig, tokenizer: Tokenizer | None) -> None:
    """Reads every record that a stage will; where bad ones are skipped, until one can be used.

    Args:
      config: names the files.
      tokenizer: the model's; None, where it is yet to be trained, leaves lengths unchecked.

    Raises:
      InputError: a record is refused, or none of a stage's can be used.
    """

    def conversations(rejects: Rejects) -> Iterator[Any]:
        if tokenizer is None:
            return config.sft.conversations(rejects)
        return read_examples(tokenizer, config.sft, rejects)

    def problems(part: PromptConfig, longest: int, rejects: Rejects) -> Iterator[Any]:
        return read_problems(tokenizer, part, longest, rejects)

    def pairs(part: PairConfig, rejects: Rejects) -> Iterator[Any]:
        if tokenizer is None:
            return read_preferences(part, rejects)
        return read_pairs(tokenizer, part, config.rejection.template, rejects)

    on_policy = functools.partial(problems, config.on_policy, config.on_policy.sequence_length)
    rejection = functools.partial(problems, config.rejection, config.longest_answer)
    reward_pairs = functools.partial(pairs, config.reward_model)
    dpo_pairs = functools.partial(pairs, config.dpo)
    for field, part, train, read in (
        ("sft.data", config.sft, config.learns_conversations, conversations),
        ("on_policy.prompts", config.on_policy, config.on_policy_train, on_policy),
        ("reward_model.pairs", config.reward_model, config.reward_train, reward_pairs),
        ("rejection.prompts", config.rejection, config.rejection_train, rejection),
        ("dpo.pairs", config.dpo, config.dpo_train, dpo_pairs),
    ):
        if train and part.files:
            _check(field, read, Rejects(part.bad_rows))
    if tokenizer is not None and config.on_policy_train is not None:
        _check_asked(config, tokenizer)


def _check_asked(config: PostTrainingConfig, tokenizer: Tokenizer) -> None:
    """The task's own problems, where on-policy distillation asks them."""
    if not config.on_policy.asks_task or config.task is None:
        return
    for problem in load_task(config.task).train[: config.problems]:
        try:
            check_length(problem, tokenizer, config.on_policy, config.on_policy.sequence_length)
        except InputError as error:
            raise InputError(f"posttraining.on_policy.prompts: {error}") from error


def _check(field: str, read: Reader, rejects: Rejects) -> None:
    found = read(rejects)
    if next(found, None) is None:
        first = f"; the first: {rejects.messages[0]}" if rejects.messages else ""
        raise InputError(f"posttraining.{field}: no record can be used{first}")
    if rejects.refuses:
        collections.deque(found, maxlen=0)
