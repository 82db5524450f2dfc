"""Conversations from files, in the forms that people keep them in."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from distill_jax.artifacts import InputError
from distill_jax.data import Record, Rejects, read_records
from distill_jax.posttraining.chat import Message
from distill_jax.posttraining.tasks import Problem

Form = Literal["auto", "messages", "alpaca", "sharegpt"]
"""How a record holds a conversation, see `to_conversation`; "auto" is found out from its fields."""

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "observation": "tool",
}
# The field that shows a form.
_MARKS: Mapping[str, Form] = {
    "messages": "messages",
    "conversations": "sharegpt",
    "instruction": "alpaca",
}


def sources(data: str | tuple[str, ...]) -> tuple[str, ...]:
    """One source or several, as several."""
    return (data,) if isinstance(data, str) else data


def read_conversations(
    files: Iterable[str], *, form: Form = "auto", split: str = "train", rejects: Rejects
) -> Iterator[tuple[str, list[Message]]]:
    """The conversations of files with their places, one after the other.

    Args:
      files: each as `data.read_records` takes it.
      form: how the records hold them.
      split: of sources that are TFDS datasets.
      rejects: decides about records that are no conversation.

    Raises:
      InputError: there is no such file, or a record is refused.
    """
    for file in files:
        for place, record in read_records(file, split=split, rejects=rejects):
            with rejects.at(place):
                yield place, to_conversation(record, form)


def to_conversation(record: Record, form: Form = "auto") -> list[Message]:
    """A record as messages.

    - "messages", as OpenAI's: the field "messages" is a list of {"role", "content"}.
    - "sharegpt": "conversations" is a list of {"from", "value"}, from human and gpt; the system's
      message may stand in "system".
    - "alpaca": "instruction" and, below a blank line, "input" are the user's, "output" is the
      assistant's; "system" and earlier turns, "history" of [user's, assistant's], may be there.

    Raises:
      InputError: fields are missing or of another type, a role is unknown, or an assistant's
        message is empty or wanting.
    """
    if form == "auto":
        form = form_of(record)
    messages = prompt_of(record, form)
    if form == "alpaca":
        messages.append(_message("assistant", record.get("output"), "output"))
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError("no message is the assistant's, so there is nothing to learn")
    return messages


def form_of(record: Record) -> Form:
    """The form that a record's fields show.

    Raises:
      InputError: none, or more than one.
    """
    found = [form for field, form in _MARKS.items() if record.get(field) is not None]
    if len(found) == 1:
        return found[0]
    problem = f"could be {' or '.join(found)}, say which" if found else "hold no conversation"
    fields = ", ".join(record).encode(errors="backslashreplace").decode()
    raise InputError(f"the fields {fields or '-'} {problem}")


def prompt_of(record: Record, form: Form) -> list[Message]:
    """The messages of a record, of "alpaca" without the output.

    Raises:
      InputError: as `to_conversation`.
    """
    messages = system_of(record)
    if form != "alpaca":
        field = "messages" if form == "messages" else "conversations"
        return messages + messages_of(record.get(field), field)
    history = record.get("history") or []
    if not isinstance(history, list | tuple):
        raise InputError("history: not a list of pairs of what was asked and answered")
    for index, turn in enumerate(history):
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise InputError(f"history {index}: not a pair of what was asked and answered")
        messages.append(_message("user", turn[0], f"history {index}"))
        messages.append(_message("assistant", turn[1], f"history {index}"))
    question = _message("user", record.get("instruction"), "instruction")
    if record.get("input"):
        below = _message("user", record["input"], "input")
        question = {**question, "content": f"{question['content']}\n\n{below['content']}"}
    return [*messages, question]


def system_of(record: Record) -> list[Message]:
    """The message in a record's field "system", or none.

    Raises:
      InputError: it is no text.
    """
    system = record.get("system")
    return [_message("system", system, "system")] if system else []


def messages_of(turns: Any, field: str) -> list[Message]:
    """A list of turns, or a single one, as messages.

    The fields of a turn are "role" and "content", or "from" and "value".

    Raises:
      InputError: it is neither, a role is unknown, or a content is no text or empty.
    """
    if isinstance(turns, Mapping):
        turns = _rows(turns)
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{field!r} is missing, empty, or no list of messages")
    messages = []
    for index, turn in enumerate(turns):
        place = f"{field} {index}"
        if not isinstance(turn, Mapping):
            raise InputError(f"{place}: not a message but {type(turn).__name__}")
        role = _either(turn, "role", "from", place)
        if not isinstance(role, str) or role not in _ROLES:
            raise InputError(f"{place}: the role {role!r} is none of {', '.join(_ROLES)}")
        if turn.get("tool_calls") or turn.get("weight", 1) not in (1, None):
            raise InputError(f"{place}: tool calls and weights of messages cannot be learnt")
        messages.append(_message(_ROLES[role], _either(turn, "content", "value", place), place))
    return messages


def _rows(turns: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Turns by column, as TFDS gives a sequence of records, or one turn by itself, as a list."""
    columns = list(turns.values())
    by_column = all(isinstance(column, list) for column in columns)
    if by_column and len({len(column) for column in columns}) < 2:
        return [dict(zip(turns, row, strict=True)) for row in zip(*columns, strict=True)]
    return [turns]


def _either(turn: Mapping[str, Any], field: str, other: str, place: str) -> Any:
    for name in (field, other):
        if turn.get(name) is not None:
            return turn[name]
    raise InputError(f"{place}: {field} is missing")


def _message(role: str, content: Any, place: str) -> Message:
    if not isinstance(content, str):
        raise InputError(f"{place}: {'missing' if content is None else 'not a text'}")
    if role in ("user", "assistant") and not content.strip():
        raise InputError(f"{place}: empty")
    try:
        content.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a pair of surrogates
        raise InputError(f"{place}: not Unicode text ({error.reason})") from error
    return {"role": role, "content": content}


def to_problem(record: Record, form: Form = "auto") -> Problem:
    """A record as a question of the user's, what was said before, and the answer it ends with.

    Raises:
      InputError: as `to_conversation`, but that there need be no answer; or nothing is asked.
    """
    if form == "auto":
        form = form_of(record)
    *before, question = prompt_of(record, form)
    answer = ""
    if form == "alpaca" and record.get("output"):
        answer = _message("assistant", record["output"], "output")["content"]
    elif question["role"] == "assistant" and before:
        answer = question["content"]
        *before, question = before
    if question["role"] != "user":
        raise InputError("the last message, or that before the answer, is not the user's")
    return Problem(prompt=question["content"], answer=answer, before=tuple(before))
