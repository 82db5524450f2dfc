"""Rows that earlier stores have already: of a corpus that grew, the teacher reads what is new."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill_jax.artifacts import InputError, diff
from distill_jax.teachers.codec import Codec
from distill_jax.teachers.forward import labels
from distill_jax.teachers.manifest import Identity
from distill_jax.teachers.shards import Record
from distill_jax.teachers.store import Store, open_store

# What else decides the content of a row's record: its key, and nothing more.
_SAME = ("teacher", "tokenizer", "sequence_length", "vocab_size", "temperature", "scheme")


class Reuse:
    """The rows of stores of the same teacher, tokenizer, scheme and temperature.

    What a store holds of a row is a function of these and of the row, up to the order in which
    its codec numbers ids. That is another for another corpus, so records are written anew from
    their decoded values, which lie on the codec's grid and stay exactly what they are.
    """

    def __init__(self, directories: Sequence[str | os.PathLike[str]], identity: Identity):
        """Opens the stores.

        Raises:
          InputError: one is not finished or is damaged, or holds what this store would not.
        """
        self._stores = [open_store(directory) for directory in directories]
        wanted = identity.to_json()
        for store in self._stores:
            stored = store.identity.to_json()
            changes = diff({n: stored[n] for n in _SAME}, {n: wanted[n] for n in _SAME})
            if changes:
                raise InputError(f"reuse: {store.directory} holds other targets ({changes[0]})")

    def has(self, key: str) -> bool:
        """Whether a row of this content key is there."""
        return self._find(key) is not None

    def count(self, keys: np.ndarray) -> int:
        """How many of the keys, bytes [rows], are there."""
        found = np.zeros(len(keys), bool)
        for store in self._stores:
            found |= store.positions(keys) >= 0
        return int(found.sum())

    def record(self, row: Mapping[str, Any], codec: Codec) -> Record | None:
        """The record of a corpus's row as `codec` writes it, or None if the row is not there.

        Raises:
          InputError: the stored record is damaged.
        """
        found = self._find(row["key"])
        if found is None:
            return None
        store, position = found
        _, key, columns = store.read_columns(position)
        tokens, segment_ids = (np.asarray(row[name]) for name in ("tokens", "segment_ids"))
        return Record(
            row_id=int(row["row_id"]),
            key=key,
            data=codec.encode(columns, key),
            tokens=int(np.count_nonzero(segment_ids)),
            # Not those stored: the value of a label that was nearly certain may have become 0.
            labels=int(np.count_nonzero(labels(tokens, segment_ids) >= 0)),
            width=int(columns["length"].max()),
        )

    def _find(self, key: str) -> tuple[Store, int] | None:
        for store in self._stores:
            position = int(store.positions([key])[0])
            if position >= 0:
                return store, position
        return None
