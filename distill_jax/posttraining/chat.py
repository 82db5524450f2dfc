"""Chat templates: from messages to tokens, and which of those tokens are the assistant's.

A template is somebody else's program, so it runs in Jinja's sandbox. What a message says is data:
a user who writes `<|im_end|>` gets those ten characters as text, never the token that ends a turn.

Text is tokenised in pieces, cut at the special tokens that the *template* wrote and where the
assistant begins and ends. The tokens before an assistant's turn are therefore exactly the tokens
that `encode_prompt` feeds the model when it answers.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.sandbox

from distill_jax.artifacts import InputError
from distill_jax.data import Tokenizer

Message = Mapping[str, Any]
"""One turn: the strings "role" and "content"."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML without a default system message: the template of a tokenizer that brings none."""

CHATML_SPECIALS = ("<|im_start|>", "<|im_end|>")
"""The special tokens that `CHATML` needs a tokenizer to have."""

LLAMA3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
"""Llama 3's prompt format without a default system message; its base models bring no template."""

# Unicode noncharacters, which no text may hold, mark the rendered text and are taken out again.
_START, _END, _LITERAL = "\ufdd0", "\ufdd1", "\ufdd2"


class Example(NamedTuple):
    """A token sequence and which of its tokens are to be learnt.

    Attributes:
      tokens: token ids.
      where: as many truth values; True where the token is one the assistant wrote.
    """

    tokens: list[int]
    where: list[bool]


def chat_template(tokenizer: Tokenizer, template: str | None = None) -> str:
    """The template in force: `template`, else the tokenizer's own, else `CHATML`."""
    return template or tokenizer.chat_template or CHATML


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], template: str | None = None
) -> Example:
    """Tokens of a whole conversation; `where` is True on what the assistant wrote.

    That is the text of every assistant message and the token that ends its turn: what a template
    puts between `{% generation %}` and `{% endgeneration %}`, or, in a template without these
    tags, what an assistant message adds to the rendering of the messages before it, up to the last
    special token.

    Args:
      tokenizer: encodes the text.
      messages: mappings with the strings "role" and "content".
      template: a Jinja template in place of the tokenizer's own.

    Raises:
      InputError: a message lacks a field, an assistant's content is empty, there is no assistant
        message, or the template fails or cannot be told apart into turns.
    """
    template = chat_template(tokenizer, template)
    _check(messages)
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError("conversation: no assistant message, so there is nothing to learn")
    protected = [_protect(tokenizer, message) for message in messages]
    text = _render(tokenizer, protected, template)
    if _START not in text:
        text = _mark_turns(tokenizer, protected, template, text)
    return _encode(tokenizer, text)


def encode_prompt(
    tokenizer: Tokenizer, messages: Sequence[Message], template: str | None = None
) -> list[int]:
    """Tokens after which the assistant speaks: the messages and the header of its turn.

    Raises:
      InputError: as `encode_chat`.
    """
    template = chat_template(tokenizer, template)
    _check(messages)
    protected = [_protect(tokenizer, message) for message in messages]
    text = _render(tokenizer, protected, template, add_generation_prompt=True)
    return _encode(tokenizer, text).tokens


def encode_answer(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    answer: str,
    template: str | None = None,
    *,
    ended: bool,
) -> list[int]:
    """Tokens of an answer behind those of `encode_prompt`, as `encode_chat` has them.

    A template may change what it is given: many take away the space around an answer.

    Args:
      tokenizer: encodes the text.
      messages: the conversation that waits for the answer.
      answer: as it is written.
      template: a Jinja template in place of the tokenizer's own.
      ended: whether the special token that ends the turn, if there is one, is among the tokens.

    Raises:
      InputError: as `encode_chat`; or the conversation does not begin with the prompt's tokens.
    """
    prompt = encode_prompt(tokenizer, messages, template)
    conversation = [*messages, {"role": "assistant", "content": answer}]
    tokens, where = encode_chat(tokenizer, conversation, template)
    if tokens[: len(prompt)] != prompt:
        raise InputError("chat template: with the answer, what stands before it is written anew")
    # Behind the last token to learn is what the template writes between turns.
    end = max((index + 1 for index, trained in enumerate(where) if trained), default=0)
    found = tokens[len(prompt) : end]
    if found and not ended and tokenizer.decode(found[-1:]) in tokenizer.special_tokens:
        del found[-1]
    return found


def end_of_turn(tokenizer: Tokenizer, template: str | None = None) -> int:
    """The id of the special token with which the template ends an assistant's turn.

    Raises:
      InputError: it ends the turn with ordinary text, so that generation could not know its end.
    """
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tokens, where = encode_chat(tokenizer, messages, template)
    last = [token for token, trained in zip(tokens, where, strict=True) if trained][-1]
    if tokenizer.decode([last]) not in tokenizer.special_tokens:
        raise InputError(
            "chat template: an assistant's turn does not end in a special token of the tokenizer "
            f"(but in {tokenizer.decode([last])!r})"
        )
    return last


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    template: str | None = None,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """The text of a conversation, as `transformers` renders it; for people to look at.

    Raises:
      InputError: as `encode_chat`.
    """
    _check(messages)
    template = chat_template(tokenizer, template)
    text = _render(tokenizer, messages, template, add_generation_prompt=add_generation_prompt)
    return text.replace(_START, "").replace(_END, "")


def _check(messages: Sequence[Message]) -> None:
    for index, message in enumerate(messages):
        for field in ("role", "content"):
            if not isinstance(message.get(field), str):
                raise InputError(f"message {index}: field {field!r} is missing or is not a string")
        if message["role"] == "assistant" and not message["content"].strip():
            raise InputError(f"message {index}: the assistant's content is empty")


@functools.lru_cache(maxsize=8)
def _special_tokens(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Matches the special tokens that are not marked as literal."""
    longest_first = sorted(tokenizer.special_tokens, key=lambda token: (-len(token), token))
    any_token = "|".join(map(re.escape, longest_first)) or "(?!)"
    return re.compile(f"(?<!{_LITERAL})(?:{any_token})")


def _protect(tokenizer: Tokenizer, value: Any) -> Any:
    """The same message, each character of a special token in it marked as literal text."""
    if isinstance(value, str):
        if reserved := re.search(f"[{_START}{_END}{_LITERAL}]", value):
            raise InputError(f"message: holds the noncharacter U+{ord(reserved[0]):04X}")
        specials = _special_tokens(tokenizer)
        return specials.sub(lambda match: "".join(_LITERAL + c for c in match[0]), value)
    if isinstance(value, Mapping):
        return {key: _protect(tokenizer, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_protect(tokenizer, item) for item in value]
    return value


def _mark_turns(tokenizer: Tokenizer, messages: Sequence[Message], template: str, text: str) -> str:
    """Marks the assistant's turns in `text`, found by rendering the messages up to each."""
    specials = _special_tokens(tokenizer)
    pieces, done = [], 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:index], template, add_generation_prompt=True)
        after = _render(tokenizer, messages[: index + 1], template)
        if not (after.startswith(before) and text.startswith(after)):
            raise InputError(
                f"chat template: message {index} changes how the messages around it are written; "
                "put {% generation %} and {% endgeneration %} around the assistant's text"
            )
        turn = after[len(before) :]
        ends = [match.end() for match in specials.finditer(turn)]
        end = len(before) + (ends[-1] if ends else len(turn))
        pieces += [text[done : len(before)], _START, text[len(before) : end], _END]
        done = end
    return "".join([*pieces, text[done:]])


def _encode(tokenizer: Tokenizer, text: str) -> Example:
    """Tokenises marked text piece by piece."""
    specials = _special_tokens(tokenizer)
    tokens: list[int] = []
    where: list[bool] = []
    trained = False
    for piece in re.split(f"([{_START}{_END}]|{specials.pattern})", text):
        if piece in (_START, _END):
            trained = piece == _START
            continue
        is_token = specials.fullmatch(piece) is not None
        ids = tokenizer.encode(piece.replace(_LITERAL, ""), special=is_token)
        tokens += ids
        where += [trained] * len(ids)
    return Example(tokens, where)


def _render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    template: str,
    *,
    add_generation_prompt: bool = False,
) -> str:
    bos, eos = (
        "" if token is None else tokenizer.decode([token])
        for token in (tokenizer.bos_id, tokenizer.eos_id)
    )
    try:
        return _compile(template).render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=bos,
            eos_token=eos,
        )
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise InputError(f"chat template: {' '.join(str(error).split())}") from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: marks what is inside as the assistant's."""

    tags = {"generation"}  # noqa: RUF012  Jinja declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, caller: jinja2.runtime.Macro) -> str:
        return _START + caller() + _END


@functools.lru_cache
def _compile(template: str) -> jinja2.Template:
    """The template in the environment that `transformers` gives it, less the clock.

    Without `strftime_now`, templates that ask for today's date fall back to a fixed one: the same
    data make the same tokens tomorrow.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"chat template: line {error.lineno}: {error.message}") from error


def _to_json(value: Any, indent: int | None = None) -> str:
    """JSON for a prompt; Jinja's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
