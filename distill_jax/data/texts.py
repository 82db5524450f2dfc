"""Plain texts from files: one .txt, a folder of .txt, or a field of records."""

import os
from collections.abc import Iterator

from etils import epath

from distill_jax import artifacts
from distill_jax.artifacts import InputError
from distill_jax.data.records import RECORDS, Placed, read_records


def read_texts(source: str | os.PathLike[str], *, field: str = "text") -> Iterator[str]:
    """The texts of `source`, stripped, in a fixed order; empty ones are left out.

    Args:
      source: a `.txt` file, a folder of `.txt` files (read by name), or what `read_records` takes.
      field: which field of each record holds the text.

    Raises:
      InputError: nothing is there, a folder holds both kinds, a record cannot be read or lacks the
        field, or a file is not UTF-8.
    """
    place = artifacts.resolve(source)
    inside = sorted(place.iterdir()) if place.is_dir() else [place]
    paths = [path for path in inside if path.suffix == ".txt"]
    records = [path for path in inside if path.suffix in RECORDS]
    if paths and records:
        raise InputError(
            f"{source}: texts are in {paths[0].name} or in {records[0].name}; a folder holds .txt "
            "files or records, not both"
        )
    texts = map(_read_text, paths) if paths else _read_field(read_records(source), field)
    return (text.strip() for text in texts if text.strip())


def _read_text(path: epath.Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error})") from error


def _read_field(records: Placed, field: str) -> Iterator[str]:
    for place, record in records:
        text = record.get(field)
        if not isinstance(text, str):
            raise InputError(f"{place}: no text in the field {field!r}")
        yield text
