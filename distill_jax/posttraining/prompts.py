"""Questions from files, for a model to answer."""

import re
from collections.abc import Iterator

from distill_jax.artifacts import InputError
from distill_jax.data import Rejects, Tokenizer, read_records
from distill_jax.posttraining.chat import encode_prompt
from distill_jax.posttraining.conversations import to_problem
from distill_jax.posttraining.rejection import RejectionConfig
from distill_jax.posttraining.rewards import VERIFIERS
from distill_jax.posttraining.tasks import Problem, to_messages


def read_problems(
    tokenizer: Tokenizer | None, config: RejectionConfig, longest: int, rejects: Rejects
) -> Iterator[Problem]:
    """The questions of the config's files.

    Args:
      tokenizer: the model's; None leaves lengths unchecked.
      config: names the files.
      longest: tokens that a question, with its answer, may have.
      rejects: decides about records that cannot be used.

    Raises:
      InputError: no file is there, or a record is refused, with its file and line.
    """
    for file in config.files:
        for place, record in read_records(file, split=config.split, rejects=rejects):
            with rejects.at(place):
                problem = to_problem(record, config.form)
                if config.reward in VERIFIERS:
                    _check_reference(problem, config.reward)
                if tokenizer is not None:
                    _check_length(problem, tokenizer, config, longest)
                yield problem


def _check_reference(problem: Problem, verifier: str) -> None:
    if not problem.answer:
        raise InputError(f"no answer that the reward {verifier!r} could compare with")
    try:
        VERIFIERS[verifier]("0", problem)  # any answer: the reference alone can be wrong
    except (ValueError, re.error) as error:
        raise InputError(f"the answer {problem.answer!r} is no {verifier} ({error})") from error


def _check_length(
    problem: Problem, tokenizer: Tokenizer, config: RejectionConfig, longest: int
) -> None:
    prompt = len(encode_prompt(tokenizer, to_messages(problem), config.template))
    if prompt + config.max_new_tokens + 1 > longest:
        raise InputError(
            f"a prompt of {prompt} tokens, {config.max_new_tokens} more and the end of the turn do "
            f"not fit in {longest}"
        )
