"""The reading side of a store: rows of targets by place or by content key."""

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import tensorflow_datasets as tfds

from distill_jax import artifacts, losses
from distill_jax.artifacts import InputError
from distill_jax.teachers import order
from distill_jax.teachers.manifest import Identity, Manifest, make_codec, read_manifest
from distill_jax.teachers.schemes import Scheme
from distill_jax.teachers.shards import KEYS, SPLIT, TOKEN_COUNTS, shard_name

_Read = TypeVar("_Read")


class Store:
    """A finished store: `store[i]` is the record of the corpus's row i.

    Attributes:
      directory: where it lies.
      manifest: what it says about itself.
      codec: encodes and decodes its records.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        """Opens a store; `open_store` is the public name.

        Raises:
          InputError: the store is not finished, a file is missing, or the counts of the corpus,
            which give the order of the ids, are damaged.
        """
        self.directory = pathlib.Path(directory)
        self.manifest: Manifest = read_manifest(directory)
        for name in self.manifest.files:
            if not (self.directory / name).exists():
                raise InputError(f"{self.directory / name}: missing from the store")
        self.codec = make_codec(self.identity, self._token_counts())
        self._records = tfds.builder_from_directory(self.directory).as_data_source(SPLIT)
        self._keys = np.load(self.directory / KEYS, mmap_mode="r", allow_pickle=False)
        self._by_key: np.ndarray | None = None

    @property
    def identity(self) -> Identity:
        """What decided the store's bytes."""
        return self.manifest.identity

    @property
    def scheme(self) -> Scheme:
        """What was kept of the teacher's distributions."""
        return self.identity.scheme

    def __len__(self) -> int:
        return self.identity.rows

    def __getitem__(self, position: int) -> dict[str, Any]:
        """{"row_id", "key", "targets": arrays of width `manifest.width`} of one row.

        Raises:
          InputError: the record is damaged.
        """
        row_id, key, columns = self.read_columns(position)
        return {"row_id": row_id, "key": key, "targets": self.scheme.unpack(columns)}

    def read_columns(self, position: int) -> tuple[int, str, dict[str, np.ndarray]]:
        """Row id, key and decoded columns of one row, before the scheme's `unpack`.

        Raises:
          InputError: the record is damaged.
        """
        return self._read(position, self.codec.decode)

    def part_bytes(self, position: int) -> dict[str, float]:
        """Bytes of each part of the record of one row; see `Codec.part_bytes`."""
        return self._read(position, self.codec.part_bytes)[2]

    def _read(
        self, position: int, use: Callable[[bytes, str, int], _Read]
    ) -> tuple[int, str, _Read]:
        position = range(len(self))[position]
        key = self._keys[position].decode()
        try:
            record = self._records[position]
            result = use(record["record"], key, self.manifest.width)
        except (ValueError, RuntimeError, IndexError, KeyError) as error:
            shard = shard_name(self.identity, position // self.identity.rows_per_shard)
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{self.directory / shard}: row {position} is damaged ({reason})"
            ) from error
        return int(record["row_id"]), key, result

    def positions(self, keys: Sequence[str]) -> np.ndarray:
        """Place in this store of the row of each content key, -1 where there is none."""
        if self._by_key is None:
            self._by_key = np.argsort(self._keys, kind="stable")
        wanted = np.array([key.encode() for key in keys], np.bytes_)
        place = np.searchsorted(self._keys, wanted, sorter=self._by_key)
        found = self._by_key[np.minimum(place, len(self) - 1)]
        return np.where(self._keys[found] == wanted, found, -1)

    def to_targets(self, arrays: Mapping[str, Any]) -> losses.TopKTargets | losses.SampledTargets:
        """What the losses take, from a batch's arrays of this store; jit-able."""
        return self.scheme.targets(arrays, self.identity.temperature)

    def _token_counts(self) -> np.ndarray:
        # A record's checksum cannot tell whether its ids are read in the right order.
        path = self.directory / TOKEN_COUNTS
        try:
            if artifacts.hash_file(path) != self.manifest.files[TOKEN_COUNTS]:
                raise InputError("its hash does not fit the manifest")
            return order.counts_from_bytes(path.read_bytes(), self.identity.vocab_size)
        except (InputError, KeyError) as error:
            raise InputError(f"{path}: {error}") from error


def open_store(directory: str | os.PathLike[str]) -> Store:
    """Opens a finished store of targets.

    Raises:
      InputError: the store is not finished, or a file is missing.
    """
    artifacts.resolve(directory)
    return Store(directory)
