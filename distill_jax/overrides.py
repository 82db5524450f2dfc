"""Fields of nested dataclasses, replaced by texts under dotted names."""

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import pydantic

from distill_jax.artifacts import InputError

Config = TypeVar("Config")


def replace_fields(config: Config, fields: Sequence[tuple[str, str]]) -> Config:
    """A frozen dataclass with fields replaced, all at once, so that they are checked together.

    Args:
      config: dataclasses, mappings and tuples in each other.
      fields: (dotted name, text) of each; the place in a tuple counts from 0: "rounds.0.distill".

    Raises:
      InputError: an unknown name, or a value of the wrong type.
    """
    replaced: Config = _replace(config, _nested(fields), "", type(config))
    return replaced


def _nested(fields: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Texts by dotted name as texts by name, level by level."""
    tree: dict[str, Any] = {}
    for name, text in fields:
        *above, last = name.split(".")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise InputError(f"--set {name}: {key!r} is set as a whole, too")
        if isinstance(node.get(last), dict):
            raise InputError(f"--set {name}: its fields are set, too")
        node[last] = text
    return tree


def _replace(node: Any, changes: Mapping[str, Any], prefix: str, hint: Any) -> Any:
    """`node`, of type `hint`, with all changes below it made at once, to be checked together."""
    if isinstance(node, tuple):
        items = {str(place): item for place, item in enumerate(node)}
        return tuple(_replace(items, changes, prefix, hint).values())
    values: dict[str, Any] = {}
    for key, change in changes.items():
        name = f"{prefix}{key}"
        if isinstance(node, Mapping):
            known, hints = list(node), dict.fromkeys(node, _items_of(hint))
        elif dataclasses.is_dataclass(node):
            known = [field.name for field in dataclasses.fields(node)]
            hints = typing.get_type_hints(type(node))
        else:
            raise InputError(f"--set {name}: there is nothing below {prefix.rstrip('.')!r}")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or '-'}"
            raise InputError(f"--set {name}: unknown field {key!r}; {hint}")
        child = node[key] if isinstance(node, Mapping) else getattr(node, key)
        if isinstance(change, str):
            values[key] = parse(name, change, hints[key])
        else:
            values[key] = _replace(child, change, f"{name}.", hints[key])
    if isinstance(node, Mapping):
        return {**node, **values}
    return dataclasses.replace(node, **values)


def _items_of(hint: Any) -> Any:
    """The type of what is in a tuple, or of a mapping's values, of the type `hint`."""
    for one in (hint, *typing.get_args(hint)):  # "X | None", too
        origin = typing.get_origin(one)
        if isinstance(origin, type) and issubclass(origin, tuple | Mapping):
            return typing.get_args(one)[0 if origin is tuple else 1]
    return Any


def parse(name: str, text: str, hint: Any) -> Any:
    """`text` as a value of the type `hint`: JSON where it is JSON, else the text itself."""
    try:
        adapter = pydantic.TypeAdapter(hint)
    except pydantic.errors.PydanticSchemaGenerationError:
        raise InputError(f"--set {name}: cannot be set as a whole; set its fields") from None
    problems = []
    for validate in (adapter.validate_json, adapter.validate_python):
        try:
            return validate(text, strict=True)
        except pydantic.ValidationError as error:
            problems.append(error.errors()[0])
    # A text that is no JSON at all was meant as it stands.
    problem = problems[1] if problems[0]["type"] == "json_invalid" else problems[0]
    raise InputError(f"--set {name}={text}: {problem['msg']}")
