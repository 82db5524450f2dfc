"""Records from the files people have: JSON lines, JSON lists, parquet and TFDS datasets."""

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
from etils import epath

from distill_jax import artifacts
from distill_jax.artifacts import InputError

Record = Mapping[str, Any]
Placed = Iterator[tuple[str, Record]]
Span = tuple[int, int]
"""A stretch of a file: from which byte, row group or record, and the first that is left out."""
BadRows = Literal["refuse", "skip"]
"""What becomes of a record that cannot be used."""


RECORDS = (".jsonl", ".parquet")
"""What the files of a folder of records end in; others are left alone."""
WHOLE: Span = (0, sys.maxsize)
"""All of a file."""
_SPAN_BYTES, _SPAN_RECORDS = 8 << 20, 4096


class Rejects:
    """Refuses the first record that cannot be used, or skips and remembers all of them.

    Attributes:
      refuses: whether it is the former.
      messages: one line a record that was skipped: where it stands, and what is wrong with it.
    """

    def __init__(self, bad_rows: BadRows = "refuse"):
        self.refuses = bad_rows == "refuse"
        self.messages: list[str] = []

    @contextlib.contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Where an InputError in the block is about the record at `place`.

        Raises:
          InputError: the same with the place before it, unless it is skipped.
        """
        try:
            yield
        except InputError as error:
            message = f"{place}: {error}"
            if self.refuses:
                raise InputError(message) from error
            self.messages.append(message)


def read_records(
    source: str | os.PathLike[str], *, split: str = "train", rejects: Rejects | None = None
) -> Placed:
    """Every record of `source` with its place, such as "chats.jsonl: line 3", in a fixed order.

    Args:
      source: what `artifacts.resolve` takes: a `.jsonl` file, a `.json` file that holds a list, a
        `.parquet` file, a folder of `.jsonl` and `.parquet` files (read by name), or the directory
        of a prepared TFDS dataset, the one with its `dataset_info.json`.
      split: of a TFDS dataset, in TFDS's own words: "train[:90%]".
      rejects: decides about lines that are not JSON objects; by default they are refused.

    Raises:
      InputError: nothing is there, it is none of these, or a record is refused.
    """
    files = record_files(source)
    rejects = rejects or Rejects()
    return itertools.chain.from_iterable(
        read_span(path, split=split, rejects=rejects) for path in files
    )


def record_files(source: str | os.PathLike[str]) -> list[epath.Path]:
    """The files of `source` in the order in which they are read; a TFDS dataset is one of them.

    Raises:
      InputError: nothing is there, or it is nothing that `read_records` takes.
    """
    place = artifacts.resolve(source)
    if is_tfds(place):
        return [place]
    if place.is_dir():
        files = sorted(p for p in place.iterdir() if p.suffix in RECORDS)
        if not files:
            raise InputError(f"{source}: no .jsonl or .parquet file inside, and no TFDS dataset")
        return files
    if place.suffix in _READERS:
        return [place]
    raise InputError(
        f"{source}: records are a .jsonl, .json or .parquet file, a folder of .jsonl and "
        ".parquet files, or a TFDS dataset"
    )


def spans(path: epath.Path, *, split: str = "train") -> list[Span]:
    """Cuts a file of `record_files` into stretches that several readers may share.

    Raises:
      InputError: the file is damaged, or has no such split.
    """
    if is_tfds(path):
        return _steps(len(_open_tfds(path, split)), _SPAN_RECORDS)
    if path.suffix == ".jsonl":
        return _steps(artifacts.size(path), _SPAN_BYTES)
    if path.suffix == ".parquet":
        with path.open("rb") as file, _parquet(path, file) as table:
            return _steps(table.num_row_groups, 1)
    return [WHOLE]


def read_span(
    path: epath.Path, span: Span = WHOLE, *, split: str = "train", rejects: Rejects | None = None
) -> Placed:
    """The records of one stretch of a file of `record_files`; those of all `spans` are the file's.

    A line belongs to the stretch in which it begins.

    Raises:
      InputError: as `read_records`.
    """
    if is_tfds(path):
        return _read_tfds(path, split, span)
    return _READERS[path.suffix](path, span, rejects or Rejects())


def _steps(end: int, step: int) -> list[Span]:
    return [(start, min(start + step, end)) for start in range(0, end, step)]


def is_tfds(place: epath.Path) -> bool:
    """Whether a directory is that of a prepared TFDS dataset."""
    return all((place / name).exists() for name in ("dataset_info.json", "features.json"))


def _read_json_lines(path: epath.Path, span: Span, rejects: Rejects) -> Placed:
    start, stop = span
    inside = f" after byte {start}" if start else ""
    name = str(path)  # once: it takes longer than a line does
    with path.open("rb") as file:
        position = 0
        if start:  # the line that reaches to or over the start is the stretch's before
            file.seek(start - 1)
            position = start - 1 + len(file.readline())
        for number, line in enumerate(file, start=1):
            if position >= stop:
                return
            position += len(line)
            place = f"{name}: line {number}{inside}"
            if line.strip():
                with rejects.at(place):
                    yield place, _mapping(_parse(line))


def _read_json(path: epath.Path, span: Span, rejects: Rejects) -> Placed:
    del span  # a list is read whole
    try:
        records = _parse(path.read_bytes())
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if not isinstance(records, list):
        raise InputError(f"{path}: not a list; records that are lines belong in a .jsonl file")
    for number, record in enumerate(records, start=1):
        place = f"{path}: record {number}"
        with rejects.at(place):
            yield place, _mapping(record)


@contextlib.contextmanager
def _parquet(path: epath.Path, file: Any) -> Iterator[Any]:
    import pyarrow.parquet  # costs a third of a second, which most commands need not wait

    try:
        yield pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: damaged ({' '.join(str(error).split())})") from error


def _read_parquet(path: epath.Path, span: Span, rejects: Rejects) -> Placed:
    del rejects  # a table has no broken rows
    name = str(path)
    with path.open("rb") as file, _parquet(path, file) as table:
        start, stop = span[0], min(span[1], table.num_row_groups)
        before = sum(table.metadata.row_group(group).num_rows for group in range(start))
        number = itertools.count(before + 1)
        for batch in table.iter_batches(batch_size=1024, row_groups=range(start, stop)):
            for record in batch.to_pylist():
                yield f"{name}: row {next(number)}", record


def _open_tfds(path: epath.Path, split: str) -> Any:
    import tensorflow_datasets as tfds  # late: it costs a third of a second

    try:
        return tfds.builder_from_directory(path).as_data_source(split=split)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise InputError(f"{path}: split {split!r}: {' '.join(str(error).split())}") from error


def _read_tfds(path: epath.Path, split: str, span: Span) -> Placed:
    source = _open_tfds(path, split)
    for index in range(span[0], min(span[1], len(source))):
        yield f"{path}: {split} record {index + 1}", _plain(source[index])


_READERS: Mapping[str, Callable[[epath.Path, Span, Rejects], Placed]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _parse(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({error})") from error


def _mapping(record: Any) -> Record:
    if not isinstance(record, dict):
        raise InputError("not a JSON object")
    return record


def _plain(value: Any) -> Any:
    """What TFDS decodes, as JSON would hold it."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
