"""Packs examples into rows of one length, as `data.batches` takes them."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from distill_jax import parallel
from distill_jax.artifacts import InputError
from distill_jax.data import RowSource, next_token_labels
from distill_jax.posttraining.chat import Example

Record = dict[str, np.ndarray]
"""One row: arrays by name, as `pack` makes them."""

ROW = ("tokens", "segment_ids", "labels", "where")
"""The arrays of a row."""


def pack(examples: Sequence[Example], sequence_length: int, *, pad_id: int = 0) -> list[Record]:
    """Rows of exactly `sequence_length` tokens, each example whole in one of them.

    An example goes into the first row that has room, in the order given, so that the same
    examples make the same rows.

    Args:
      examples: tokens, and which of them are to be learnt.
      sequence_length: length T of a row.
      pad_id: the token that fills up a row.

    Returns:
      Records of arrays [T]: "tokens" int32; "segment_ids" int32, 1, 2, ... by example and 0 in
      padding; "labels" int32, the next token of the same example; "where" bool, True where that
      next token is to be learnt.

    Raises:
      InputError: an example is longer than a row, or has nothing to learn.
    """
    rows: list[list[Example]] = []
    free = np.full(len(examples), sequence_length)  # of rows not begun, too
    for index, example in enumerate(examples):
        try:
            check_example(example, sequence_length)
        except InputError as error:
            raise InputError(f"example {index}: {error}") from error
        length = len(example.tokens)
        row = int(np.argmax(free[: len(rows) + 1] >= length))
        if row == len(rows):
            rows.append([])
        rows[row].append(example)
        free[row] -= length
    return [to_record(row, sequence_length, pad_id=pad_id) for row in rows]


def filled_batches(
    rows: Sequence[Record], size: int, mesh: Mesh | None = None
) -> Iterator[tuple[Sequence[Record], dict[str, Any]]]:
    """Some rows at a time, and the arrays of `ROW` [R, ...] of a batch of them.

    The last batch is filled up with copies, so that all have one shape and compile once.

    Args:
      rows: all rows.
      size: how many a batch has, R, or each device of a mesh at most of it.
      mesh: over which the batches are spread; None leaves them on the host.
    """
    if mesh is not None:
        shards = parallel.row_shards(mesh)
        size = max(min(size, -(-len(rows) // shards)), 1) * shards
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        filled = [*part, *[part[-1]] * (size - len(part))]
        batch = {name: np.stack([row[name] for row in filled]) for name in ROW}
        yield part, batch if mesh is None else jax.device_put(batch, parallel.batch_sharding(mesh))


def check_example(example: Example, sequence_length: int) -> None:
    """Checks that an example can be learnt in a row.

    Raises:
      InputError: it is longer, or has nothing to learn.
    """
    length = len(example.tokens)
    if length > sequence_length:
        raise InputError(f"{length} tokens do not fit in {sequence_length}")
    if not any(example.where[1:]):
        raise InputError("no token to learn")


def with_replay(rows: Sequence[Record], corpus: RowSource, share: float) -> list[Record]:
    """The rows, and behind them so many of plain text that these make up `share` of all rows.

    Every token of the text is learnt: what the model knew is rehearsed while it learns to answer
    (Ibrahim et al. 2024, "Simple and Scalable Strategies to Continually Pre-train").

    Args:
      rows: as `pack` makes them.
      corpus: records with "tokens" and "segment_ids" [T]; the first ones are taken, all if they
        are too few.
      share: of the rows, in [0, 1); rounded up.

    Raises:
      InputError: the text's rows have another length.
    """
    count = min(math.ceil(len(rows) * share / (1 - share)), len(corpus))
    replayed = []
    for index in range(count):
        record = corpus[index]
        tokens, segment_ids = record["tokens"], record["segment_ids"]
        if len(tokens) != len(rows[0]["tokens"]):
            raise InputError(
                f"replay: rows of text have {len(tokens)} tokens, the others "
                f"{len(rows[0]['tokens'])}"
            )
        labels, where = next_token_labels(tokens, segment_ids)
        replayed.append(
            {"tokens": tokens, "segment_ids": segment_ids, "labels": labels, "where": where}
        )
    return [*rows, *replayed]


def to_record(examples: Sequence[Example], sequence_length: int, *, pad_id: int = 0) -> Record:
    """One row that holds `examples` one after the other; see `pack`."""
    record = {
        "tokens": np.full(sequence_length, pad_id, np.int32),
        "segment_ids": np.zeros(sequence_length, np.int32),
        "labels": np.full(sequence_length, pad_id, np.int32),
        "where": np.zeros(sequence_length, bool),
    }
    start = 0
    for segment, example in enumerate(examples, start=1):
        end = start + len(example.tokens)
        record["tokens"][start:end] = example.tokens
        record["segment_ids"][start:end] = segment
        record["labels"][start : end - 1] = example.tokens[1:]
        record["where"][start : end - 1] = example.where[1:]
        start = end
    return record
