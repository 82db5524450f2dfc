"""Plain texts from files: one .txt, a folder of .txt, or a field of records."""

import itertools
import os
from collections.abc import Iterable, Iterator

from etils import epath

from distill_jax import artifacts
from distill_jax.artifacts import InputError
from distill_jax.data.records import RECORDS, WHOLE, Placed, Span, read_span, record_files, spans

_TEXT = ".txt"


def read_texts(source: str | os.PathLike[str], *, field: str = "text") -> Iterator[str]:
    """The texts of `source`, stripped, in a fixed order; empty ones are left out.

    Args:
      source: a `.txt` file, a folder of `.txt` files (read by name), or what `read_records` takes.
      field: which field of each record holds the text.

    Raises:
      InputError: nothing is there, a folder holds both kinds, a record cannot be read or lacks the
        field, or a file is not UTF-8.
    """
    files = text_files(source)
    return itertools.chain.from_iterable(read_text_span(path, field=field) for path in files)


def text_files(source: str | os.PathLike[str]) -> list[epath.Path]:
    """The files of `source` in the order in which `read_texts` reads them.

    Raises:
      InputError: nothing is there, it is nothing that holds texts, or a folder holds both kinds.
    """
    place = artifacts.resolve(source)
    inside = sorted(place.iterdir()) if place.is_dir() else [place]
    paths = [path for path in inside if path.suffix == _TEXT]
    records = [path for path in inside if path.suffix in RECORDS]
    if paths and records:
        raise InputError(
            f"{source}: texts are in {paths[0].name} or in {records[0].name}; a folder holds .txt "
            "files or records, not both"
        )
    return paths or record_files(source)


def text_spans(path: epath.Path) -> list[Span]:
    """Cuts a file of `text_files` into stretches that several readers may share."""
    return [WHOLE] if path.suffix == _TEXT else spans(path)


def read_text_span(path: epath.Path, span: Span = WHOLE, *, field: str = "text") -> Iterator[str]:
    """The texts of one stretch of a file of `text_files`, as `read_texts` gives them.

    Raises:
      InputError: as `read_texts`.
    """
    if path.suffix == _TEXT:
        texts: Iterable[str] = map(_read_text, [path])
    else:
        texts = _read_field(read_span(path, span), field)
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
