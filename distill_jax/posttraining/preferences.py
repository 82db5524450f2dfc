"""Preference pairs from files: a conversation and two answers, of which one is preferred."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from distill_jax.artifacts import InputError
from distill_jax.data import Record, Rejects, Tokenizer, read_records
from distill_jax.posttraining.chat import Message, end_of_turn
from distill_jax.posttraining.conversations import form_of, messages_of, prompt_of
from distill_jax.posttraining.pairs import Pair, PairConfig, check_pair, encode_pair


class Preference(NamedTuple):
    """A conversation that waits for an answer, and two answers to it."""

    prompt: list[Message]
    chosen: str
    rejected: str


def read_pairs(
    tokenizer: Tokenizer, config: PairConfig, template: str | None, rejects: Rejects
) -> Iterator[Pair]:
    """The pairs of the config's files, in tokens; each fits in its rows.

    Args:
      tokenizer: the model's.
      config: names the files.
      template: a chat template in place of the tokenizer's own, or None.
      rejects: decides about records that cannot be used.

    Raises:
      InputError: no file is there, or a record is refused, with its file and line.
    """
    ending = [end_of_turn(tokenizer, template)] if config.ended else []
    for place, preference in read_preferences(config, rejects):
        with rejects.at(place):
            prompt, *answers = encode_pair(tokenizer, *preference, template)
            pair = Pair(prompt, *([*answer, *ending] for answer in answers))
            check_pair(pair, config.sequence_length)
            yield pair


def read_preferences(config: PairConfig, rejects: Rejects) -> Iterator[tuple[str, Preference]]:
    """What the config's files hold, with their places; see `read_pairs`."""
    for file in config.files:
        for place, record in read_records(file, split=config.split, rejects=rejects):
            with rejects.at(place):
                yield place, to_preference(record)


def to_preference(record: Record) -> Preference:
    """A record as a preference; the forms are those that TRL reads, and those of conversations.

    "chosen" and "rejected" are each the text of an answer, a message, or a list of messages: the
    answer alone, or the conversation with it, of which both begin alike. What was asked is in
    "prompt", a user's text or a list of messages; or in the fields of `to_conversation`, without
    its last answer; or in the conversations themselves.

    Raises:
      InputError: a field is missing or of another type, an answer is empty, there is no prompt, or
        both answers are the same.
    """
    chosen, rejected = (_answer(record.get(name), name) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise InputError("chosen and rejected are the same")
    pairs = zip(chosen, rejected, strict=False)
    shared = [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    prompt = _prompt(record, whole=bool(shared))
    if shared[: len(prompt)] != prompt:
        shared = [*prompt, *shared]
        chosen, rejected = ([*prompt, *turns] for turns in (chosen, rejected))
    answers = []
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        answer = turns[len(shared) :]
        if [turn["role"] for turn in answer] != ["assistant"]:
            raise InputError(f"{name}: not one message of the assistant's behind what both share")
        answers.append(answer[0]["content"])
    if not shared or shared[-1]["role"] == "assistant":
        raise InputError("there is no prompt" if not shared else "the prompt has been answered")
    return Preference(shared, *answers)


def _answer(value: Any, name: str) -> list[Message]:
    if isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    elif isinstance(value, Mapping) and isinstance(value.get("role", value.get("from")), str):
        value = [value]
    return messages_of(value, name)


def _prompt(record: Record, *, whole: bool) -> list[Message]:
    """What stands before the answers, unless they are `whole` conversations that repeat it."""
    prompt = record.get("prompt")
    if isinstance(prompt, str):
        return [] if whole else messages_of([{"role": "user", "content": prompt}], "prompt")
    if prompt is not None:
        return messages_of(prompt, "prompt")
    if whole:
        return []
    return prompt_of(record, form_of(record))
