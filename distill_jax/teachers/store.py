"""The reading side of a store: rows of targets by place or by content key."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from etils import epath

from distill_jax import artifacts, losses
from distill_jax.artifacts import InputError
from distill_jax.teachers import order
from distill_jax.teachers.cache import LocalFiles
from distill_jax.teachers.codec import CorruptRecord
from distill_jax.teachers.manifest import (
    MANIFEST,
    Identity,
    Manifest,
    make_codec,
    read_manifest,
)
from distill_jax.teachers.schemes import Scheme
from distill_jax.teachers.shards import KEYS, SMALL_FILES, SPLIT, TOKEN_COUNTS, shard_name

_Read = TypeVar("_Read")


class Store:
    """A finished store: `store[i]` is the record of the corpus's row i.

    A remote one is read from local copies of its shards, made as they are asked for (`cache`).

    Attributes:
      directory: where it lies.
      manifest: what it says about itself.
      codec: encodes and decodes its records.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        """Opens a store; `open_store` is the public name.

        Raises:
          InputError: the store is not finished, or a file is missing or damaged; damage of a
            shard shows when its records are read.
        """
        import tensorflow_datasets as tfds  # late: it costs a third of a second

        self.directory = epath.Path(directory)
        self.manifest: Manifest = read_manifest(directory)
        self._files = LocalFiles(self.directory, self.manifest)
        self._check_files()
        counts = self._files.fetch(TOKEN_COUNTS)
        try:
            token_counts = order.counts_from_bytes(counts.read_bytes(), self.identity.vocab_size)
        except InputError as error:
            raise InputError(f"{counts}: {error}") from error
        self.codec = make_codec(self.identity, token_counts)
        self._records = tfds.builder_from_directory(self._files.directory).as_data_source(SPLIT)
        self._keys = np.load(self._files.fetch(KEYS), mmap_mode="r", allow_pickle=False)
        if len(self._keys) != len(self):
            raise InputError(f"{directory}: has keys of {len(self._keys)} rows, not {len(self)}")
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

    def key(self, position: int) -> str:
        """The content key of one row."""
        return self._keys[position].decode()

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
        key = self.key(position)
        shard = shard_name(self.identity, position // self.identity.rows_per_shard)
        place = self._files.fetch(shard)
        try:
            record = self._records[position]
            if record["record"] is None:  # so reads a shard cut to a multiple of 64 KiB
                raise CorruptRecord("it is empty")
            result = use(record["record"], key, self.manifest.width)
        except (ValueError, RuntimeError, IndexError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{place}: row {position} is damaged ({reason})") from error
        return int(record["row_id"]), key, result

    def positions(self, keys: Sequence[str] | np.ndarray) -> np.ndarray:
        """Place in this store of the row of each content key, -1 where there is none.

        Keys are texts, or an array of bytes as stores keep them.
        """
        if self._by_key is None:
            self._by_key = np.argsort(self._keys, kind="stable")
        wanted = keys if isinstance(keys, np.ndarray) else np.array(keys, np.str_).astype(np.bytes_)
        place = np.searchsorted(self._keys, wanted, sorter=self._by_key)
        found = self._by_key[np.minimum(place, len(self) - 1)]
        return np.where(self._keys[found] == wanted, found, -1)

    def to_targets(self, arrays: Mapping[str, Any]) -> losses.TopKTargets | losses.SampledTargets:
        """What the losses take, from a batch's arrays of this store; jit-able."""
        return self.scheme.targets(arrays, self.identity.temperature)

    def _check_files(self) -> None:
        """Looks for all files and hashes all but the shards, whose records have checksums."""
        files = self.manifest.files
        # However many shards there are said to be, one of the first is not named if there are more.
        shards = {
            shard_name(self.identity, i) for i in range(min(self.identity.shards, len(files)))
        }
        for name in sorted({*shards, *SMALL_FILES} - files.keys()):
            raise InputError(f"{self.directory / MANIFEST}: does not name {name}")
        there = {path.name for path in self.directory.iterdir()}
        for name, expected in files.items():
            if name not in there:
                raise InputError(f"{self.directory / name}: missing from the store")
            if name not in shards:
                path = self._files.fetch(name)
                if artifacts.hash_file(path) != expected:
                    raise InputError(f"{path}: its hash does not fit the manifest")


def open_store(directory: str | os.PathLike[str]) -> Store:
    """Opens a finished store of targets.

    Raises:
      InputError: the store is not finished, or a file is missing or damaged.
    """
    artifacts.resolve(directory)
    return Store(directory)
