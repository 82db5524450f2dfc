"""A corpus's rows on their way to the teacher, in batches of one shape."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from distill_jax.artifacts import InputError
from distill_jax.teachers import sampling
from distill_jax.teachers.forward import labels
from distill_jax.teachers.manifest import Identity


class Corpus(Protocol):
    """What is read from a corpus; `data.Corpus` is one.

    A row is {"row_id": int, "key": str, "tokens": int [T], "segment_ids": int [T], 0 for padding}.
    """

    fingerprint: str
    tokenizer_fingerprint: str
    sequence_length: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of one shard, by their place in the corpus.

    Attributes:
      shard: the shard.
      asked: rows that the teacher is asked about, as many as a batch holds or fewer.
      known: rows that need no teacher.
      last: whether the shard ends with them.
    """

    shard: int
    asked: Mapping[int, Mapping[str, Any]]
    known: Mapping[int, Mapping[str, Any]]
    last: bool

    @property
    def tokens(self) -> int:
        """Tokens of all its rows."""
        rows = (*self.asked.values(), *self.known.values())
        return sum(int(np.count_nonzero(row["segment_ids"])) for row in rows)


def inputs(batch: Batch | None, size: int, identity: Identity) -> tuple[np.ndarray, ...]:
    """Tokens, segments, labels [size, T] and seeds [size, 2] of the rows to ask about.

    Behind them, and without a batch, the rows are empty: all batches have the compiled shape.
    """
    asked = [] if batch is None else list(batch.asked.values())
    tokens_BT = np.zeros((size, identity.sequence_length), np.int32)
    segment_ids_BT = np.zeros_like(tokens_BT)
    for place, row in enumerate(asked):
        tokens_BT[place], segment_ids_BT[place] = row["tokens"], row["segment_ids"]
    seeds = np.zeros((size, 2), np.uint32)
    seeds[: len(asked)] = sampling.row_seeds([row["key"] for row in asked], salt=identity.teacher)
    return tokens_BT, segment_ids_BT, labels(tokens_BT, segment_ids_BT), seeds


def batches(
    corpus: Corpus,
    identity: Identity,
    shards: Sequence[int],
    size: int,
    is_known: Callable[[int, str], bool],
) -> Iterator[Batch]:
    """Batches of the given shards' rows in order; none spans two shards.

    Args:
      corpus: the rows.
      identity: of a store; its teacher's vocabulary bounds the tokens.
      shards: which shards.
      size: rows to ask about in one batch.
      is_known: whether the row of this shard and content key needs no teacher.

    Raises:
      InputError: a row is of another length, or has a token outside the vocabulary.
    """
    for shard in shards:
        asked: dict[int, Mapping[str, Any]] = {}
        known: dict[int, Mapping[str, Any]] = {}
        for row in identity.shard_rows(shard):
            record = corpus[row]
            check_row(record, row, identity)
            if is_known(shard, record["key"]):
                known[row] = record
                continue
            if len(asked) == size:
                yield Batch(shard=shard, asked=asked, known=known, last=False)
                asked, known = {}, {}
            asked[row] = record
        yield Batch(shard=shard, asked=asked, known=known, last=True)


def check_row(record: Mapping[str, Any], row: int, identity: Identity) -> None:
    """Refuses a row that the teacher cannot read.

    Raises:
      InputError: it is of another length, or has a token outside the vocabulary.
    """
    for name in ("tokens", "segment_ids"):
        shape = np.shape(record[name])
        if shape != (identity.sequence_length,):
            raise InputError(
                f"corpus {identity.corpus}: row {row} has {name} of shape {shape}, "
                f"not ({identity.sequence_length},)"
            )
    tokens = np.asarray(record["tokens"])
    if tokens.min() < 0 or tokens.max() >= identity.vocab_size:
        raise InputError(
            f"corpus {identity.corpus}: row {row} has token "
            f"{tokens.min() if tokens.min() < 0 else tokens.max()}, "
            f"the teacher's vocabulary ends at {identity.vocab_size - 1}"
        )
