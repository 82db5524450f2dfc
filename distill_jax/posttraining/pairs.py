"""Pairs of answers, of which one is preferred, as rows."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from distill_jax.artifacts import InputError, check_choices
from distill_jax.data import BadRows, Tokenizer
from distill_jax.posttraining.chat import Example, Message, encode_answer, encode_prompt
from distill_jax.posttraining.conversations import sources
from distill_jax.posttraining.rejection import encode_record
from distill_jax.posttraining.rows import ROW, Record, to_record

SAMPLES = "samples"
"""Stands for the pairs of rejection sampling among `PairConfig.pairs`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairConfig:
    """Which pairs, and how they become rows.

    Attributes:
      pairs: where they come from, one source or several: a file, a folder or a TFDS dataset as
        `data.read_records` takes it, `gs://` too, with the fields of `to_preference`; "samples" is
        the best and the worst of what rejection sampling drew.
      split: of sources that are TFDS datasets.
      bad_rows: whether a record that cannot be used (not JSON, a field missing, an empty answer,
        twice the same, longer than a row) is refused, or skipped and counted.
      sequence_length: tokens of a row; a row holds one answer with its prompt.
      ended: whether the token that ends a turn is part of an answer.
    """

    ended: ClassVar[bool] = False

    pairs: str | tuple[str, ...] = SAMPLES
    split: str = "train"
    bad_rows: BadRows = "refuse"
    sequence_length: int = 256

    def __post_init__(self) -> None:
        check_choices(self, {"bad_rows": BadRows})
        if self.sequence_length < 2:
            name = f"{type(self).__name__}.sequence_length"
            raise InputError(f"{name} is {self.sequence_length}; at least 2")

    @property
    def uses_samples(self) -> bool:
        """Whether what rejection sampling drew is among the pairs."""
        return SAMPLES in sources(self.pairs)

    @property
    def files(self) -> tuple[str, ...]:
        """The other sources."""
        return tuple(source for source in sources(self.pairs) if source != SAMPLES)


class Pair(NamedTuple):
    """A prompt and two answers to it, in tokens."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def sampled_pairs(
    tokenizer: Tokenizer, records: Sequence[dict[str, Any]], template: str | None = None
) -> list[Pair]:
    """The best and the worst answer to each problem that has both, from `rejection.sample`."""
    return [
        Pair(
            encode_record(tokenizer, record, template),
            record["samples"][record["chosen"]]["tokens"],
            record["samples"][record["rejected"]]["tokens"],
        )
        for record in records
        if record["rejected"] is not None
    ]


def encode_pair(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    chosen: str,
    rejected: str,
    template: str | None = None,
    *,
    ended: bool = False,
) -> Pair:
    """A pair from text: a conversation that waits for an answer, and two answers.

    Raises:
      InputError: as `encode_answer`, of which `ended` is.
    """
    answers = (
        encode_answer(tokenizer, messages, answer, template, ended=ended)
        for answer in (chosen, rejected)
    )
    return Pair(encode_prompt(tokenizer, messages, template), *answers)


def pair_rows(
    pairs: Sequence[Pair], config: PairConfig = PairConfig(), *, pad_id: int = 0
) -> list[Record]:
    """Pairs as records of arrays [2, T], the chosen answer first: the fields of `rows.pack`.

    Raises:
      InputError: an answer is empty, both are the same, or a prompt and its answer are longer
        than a row; the message has the pair's number.
    """
    records = []
    for index, pair in enumerate(pairs):
        try:
            check_pair(pair, config.sequence_length)
        except InputError as error:
            raise InputError(f"pair {index}: {error}") from error
        halves = [
            to_record([_example(pair.prompt, answer)], config.sequence_length, pad_id=pad_id)
            for answer in (pair.chosen, pair.rejected)
        ]
        records.append({name: np.stack([half[name] for half in halves]) for name in ROW})
    return records


def both_answers(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of pairs [B, 2, T] as rows [2 B, T]; the rejected answer follows the chosen one."""
    return {name: batch[name].reshape(-1, batch[name].shape[-1]) for name in ROW}


def check_pair(pair: Pair, sequence_length: int) -> None:
    """Checks that both answers of a pair fit in a row behind their prompt, and teach something.

    Raises:
      InputError: an answer or the prompt is empty, both answers are the same, or one is too long.
    """
    if not pair.prompt:
        raise InputError("the prompt is empty")
    if pair.chosen == pair.rejected:
        raise InputError("chosen and rejected are the same")
    for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not answer:
            raise InputError(f"the {name} answer is empty")
        length = len(pair.prompt) + len(answer)
        if length > sequence_length:
            raise InputError(
                f"prompt and {name} answer are {length} tokens, a row holds {sequence_length}"
            )


def _example(prompt: list[int], answer: list[int]) -> Example:
    return Example([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))
