"""Batches for every loop: shuffled anew each epoch, resumable in the middle, split over hosts."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from distill_jax.artifacts import InputError
from distill_jax.data.packing import next_token_labels

if TYPE_CHECKING:
    import grain


class RowSource(Protocol):
    """What batches are drawn from: a list of dict records, a `Corpus`, a join with targets.

    It is read from several threads at once.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


def batches(
    source: RowSource,
    *,
    batch_rows: int,
    seed: int,
    shuffle: bool = True,
    epochs: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> "grain.DatasetIterator":
    """Iterates over batches of rows.

    Batch number g of an epoch holds the same rows however many processes share it; each process
    is given its own `batch_rows / process_count` of them. A row is seen at most once an epoch,
    and the rows left over after the last whole batch are left out of that epoch.

    Args:
      source: records with "tokens" and "segment_ids", int [T], and any other arrays, nested dicts
        of arrays or numbers. A record's own "labels" and "where" are kept (a prompt masked out),
        otherwise `next_token_labels` makes them. Strings stay behind: a batch holds only what a
        device can take.
      batch_rows: rows of a batch over all processes.
      seed: of the order; epoch e is shuffled on its own.
      shuffle: False keeps the order of the source.
      epochs: how often to go through; None for no end.
      process_index: which process this is.
      process_count: of how many.

    Returns:
      An iterator of dicts of arrays [B, ...]. `get_state()` and `set_state(state)` resume it
      exactly, given the same source and arguments.

    Raises:
      InputError: `source` is smaller than a batch, or processes cannot share a batch evenly.
    """
    import grain  # imports JAX, which whoever only makes a corpus need not have

    if batch_rows < 1 or batch_rows % process_count:
        raise InputError(f"batch_rows: {batch_rows} rows do not divide over {process_count} hosts")
    if not 0 <= process_index < process_count:
        raise InputError(f"process_index: {process_index} is not below {process_count}")
    used = len(source) // batch_rows * batch_rows
    if not used:
        raise InputError(f"batch_rows: {batch_rows} is more than the {len(source)} rows there are")
    # Counted in batches. Grain's default of 500 would hold gigabytes of stored targets.
    read_ahead = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
    rows = grain.MapDataset.source(source).seed(seed)
    if shuffle:
        rows = rows.shuffle()
    return iter(
        rows[:used][process_index::process_count]
        .map(to_example)
        .batch(batch_rows // process_count, drop_remainder=True)
        .repeat(epochs)
        .to_iter_dataset(read_ahead)
    )


def to_example(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as a batch has it: with "labels" and "where", without strings."""
    example = _without_strings(record)
    if "labels" not in example:
        example["labels"], example["where"] = next_token_labels(
            np.asarray(example["tokens"]), np.asarray(example["segment_ids"])
        )
    return example


def _without_strings(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_strings(value) if isinstance(value, Mapping) else np.asarray(value)
        for name, value in record.items()
        if not isinstance(value, str | bytes)
    }
