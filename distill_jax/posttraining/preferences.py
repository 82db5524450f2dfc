"""Preference pairs from files: a conversation and two answers, of which one is preferred."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from distill_jax.artifacts import InputError
from distill_jax.data import Record, Rejects, Tokenizer, read_records
from distill_jax.posttraining.chat import Message, end_of_turn
from distill_jax.posttraining.conversations import form_of, messages_of, prompt_of, system_of
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
    if config.ended:
        end_of_turn(tokenizer, template)  # refuses a template that has none
    for place, preference in read_preferences(config, rejects):
        with rejects.at(place):
            pair = encode_pair(tokenizer, *preference, template, ended=config.ended)
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
    "prompt", a user's text or messages; or in the fields of `to_conversation`, without its last
    answer; or in the conversations themselves: they are whole if they share a user's message and
    do not begin with the assistant's. A system's message comes first: what the conversations share,
    else the prompt's, else the field "system".

    Raises:
      InputError: a field is missing or of another type, an answer is empty, both answers are the
        same, there are two system messages, or the prompt is not for the assistant to answer.
    """
    chosen, rejected = (_answer(record.get(name), name) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise InputError("chosen and rejected are the same")
    pairs = zip(chosen, rejected, strict=False)
    shared = [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    answers = []
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        answer = turns[len(shared) :]
        if [turn["role"] for turn in answer] != ["assistant"]:
            raise InputError(f"{name}: not one message of the assistant's behind what both share")
        answers.append(answer[0]["content"])
    return Preference(_prompt(record, shared), *answers)


def _answer(value: Any, name: str) -> list[Message]:
    if isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    return messages_of(value, name)


def _prompt(record: Record, shared: list[Message]) -> list[Message]:
    """What stands before the answers, of which `shared` is what both conversations begin with."""
    whole = any(turn["role"] == "user" for turn in shared) and shared[0]["role"] != "assistant"
    common, shared = _split(shared)
    given, asked = _split(_asked(record, whole=whole))
    if common and given and common != given:
        raise InputError("the prompt begins with another system message than chosen and rejected")
    if shared[: len(asked)] != asked:
        shared = [*asked, *shared]
    prompt = [*(common or given or system_of(record)), *shared]
    if not prompt:
        raise InputError("there is no prompt")
    if prompt[-1]["role"] == "assistant":
        raise InputError("the prompt has been answered")
    if prompt[-1]["role"] == "system":
        raise InputError("the prompt ends with the system's message, so nothing is asked")
    return prompt


def _asked(record: Record, *, whole: bool) -> list[Message]:
    """The record's own prompt; that of `whole` conversations may be missing, a text repeats it."""
    prompt = record.get("prompt")
    if whole and (prompt is None or isinstance(prompt, str)):
        return []
    if prompt is None:
        return prompt_of(record, form_of(record))
    if isinstance(prompt, str):
        prompt = {"role": "user", "content": prompt}
    return messages_of(prompt, "prompt")


def _split(turns: list[Message]) -> tuple[list[Message], list[Message]]:
    """The system's message that turns begin with, or none, and the rest."""
    system = turns[:1] if turns and turns[0]["role"] == "system" else []
    return system, turns[len(system) :]
