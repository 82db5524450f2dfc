"""What a model is asked, and how its answers are drawn."""

import dataclasses
import re
from collections.abc import Iterator

from distill_jax.artifacts import InputError, check_choices
from distill_jax.data import BadRows, Rejects, Tokenizer, read_records
from distill_jax.models import Sampling
from distill_jax.posttraining.chat import encode_prompt
from distill_jax.posttraining.conversations import Form, sources, to_problem
from distill_jax.posttraining.rewards import VERIFIERS
from distill_jax.posttraining.tasks import TASK, Problem, to_messages


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """What is asked, and how answers are drawn.

    Attributes:
      prompts: where questions come from, one source or several: "task" is the recipe's task; others
        are files as `SftConfig.data` has them, and where a conversation ends with an answer it is
        the reference.
      form: as `SftConfig.form`, of these files; so `split` and `bad_rows`.
      split: see `form`.
      bad_rows: see `form`.
      temperature: of sampling, above 0.
      top_p: sample from the smallest set of tokens with this much probability; None: from all.
      max_new_tokens: where an answer that does not end is cut off.
      template: a chat template in place of the tokenizer's own.
      seed: of the sampling.
    """

    prompts: str | tuple[str, ...] = TASK
    form: Form = "auto"
    split: str = "train"
    bad_rows: BadRows = "refuse"
    temperature: float = 1.0
    top_p: float | None = None
    max_new_tokens: int = 32
    template: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_choices(self, {"form": Form, "bad_rows": BadRows})
        if self.max_new_tokens < 1:
            raise InputError(f"{name}.max_new_tokens is {self.max_new_tokens}; at least 1")
        if not self.temperature > 0:
            raise InputError(f"{name}.temperature is {self.temperature}; above 0")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"{name}.top_p is {self.top_p}; in (0, 1]")

    @property
    def asks_task(self) -> bool:
        """Whether the task's problems are among the prompts."""
        return TASK in sources(self.prompts)

    @property
    def files(self) -> tuple[str, ...]:
        """The files that prompts come from."""
        return tuple(source for source in sources(self.prompts) if source != TASK)

    @property
    def sampling(self) -> Sampling:
        """How a token is drawn."""
        return Sampling(temperature=self.temperature, top_p=self.top_p)

    @property
    def verifier(self) -> str | None:
        """The key of `VERIFIERS` that compares answers with references, if one does."""
        return None


def read_problems(
    tokenizer: Tokenizer | None, config: PromptConfig, longest: int, rejects: Rejects
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
                if config.verifier is not None:
                    _check_reference(problem, config.verifier)
                if tokenizer is not None:
                    check_length(problem, tokenizer, config, longest)
                yield problem


def check_length(
    problem: Problem, tokenizer: Tokenizer, config: PromptConfig, longest: int
) -> None:
    """Checks that a question and an answer to it fit.

    Raises:
      InputError: they have more than `longest` tokens.
    """
    prompt = len(encode_prompt(tokenizer, to_messages(problem), config.template))
    if prompt + config.max_new_tokens + 1 > longest:
        raise InputError(
            f"a prompt of {prompt} tokens, {config.max_new_tokens} more and the end of the turn do "
            f"not fit in {longest}"
        )


def _check_reference(problem: Problem, verifier: str) -> None:
    if not problem.answer:
        raise InputError(f"no answer that the reward {verifier!r} could compare with")
    try:
        VERIFIERS[verifier]("0", problem)  # any answer: the reference alone can be wrong
    except (ValueError, re.error) as error:
        raise InputError(f"the answer {problem.answer!r} is no {verifier} ({error})") from error
