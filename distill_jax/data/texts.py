"""Plain texts from files: .jsonl with a field, a folder of .txt, one .txt."""

import json
import os
from collections.abc import Iterator

from etils import epath

from distill_jax import artifacts
from distill_jax.artifacts import InputError


def read_texts(source: str | os.PathLike[str], *, field: str = "text") -> Iterator[str]:
    """The texts of `source`, stripped, in a fixed order; empty ones are left out.

    Args:
      source: a `.jsonl` file, a `.txt` file, or a folder of `.txt` files (read by name).
      field: which field of each JSON line holds the text.

    Raises:
      InputError: nothing is there, a line is not JSON, a line lacks the field, or a file is not
        UTF-8.
    """
    place = artifacts.resolve(source)
    texts: Iterator[str]
    if place.is_dir():
        paths = sorted(path for path in place.iterdir() if path.suffix == ".txt")
        if not paths:
            raise InputError(f"{source}: no .txt file inside")
        texts = (_read_text(path) for path in paths)
    elif place.suffix == ".jsonl":
        texts = _read_json_lines(place, field)
    elif place.suffix == ".txt":
        texts = iter([_read_text(place)])
    else:
        raise InputError(f"{source}: texts are a .jsonl file, a .txt file or a folder of .txt")
    return (text.strip() for text in texts if text.strip())


def _read_text(path: epath.Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error})") from error


def _read_json_lines(path: epath.Path, field: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}: line {number} is not JSON ({error})") from error
            text = record.get(field) if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise InputError(f"{path}: line {number} has no text in the field {field!r}")
            yield text
