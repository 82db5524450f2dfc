"""The writing side of a store: shards committed one by one, and the files that seal it.

A shard holds a fixed range of corpus rows. It appears under its name only when it is whole
and on disk; beside it, in `.progress`, a small JSON file says what it holds. Both are a
function of the store's identity alone, so a writer that was killed at any moment and started
again ends with the same bytes as one that was left alone.
"""

import contextlib
import dataclasses
import io
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from array_record.python import array_record_module
from etils import epath

from distill_jax import artifacts
from distill_jax.artifacts import InputError
from distill_jax.teachers import order
from distill_jax.teachers.manifest import MANIFEST, Identity, Manifest, make_codec, read_manifest

DATASET = "teacher_targets"
SPLIT = "rows"
KEYS = "keys.npy"
TOKEN_COUNTS = "token_counts.bin"
"""Names inside a store: the TFDS dataset, its split, the rows' content keys, and how often each
id occurs in the corpus."""
SMALL_FILES = (KEYS, TOKEN_COUNTS, "dataset_info.json", "features.json")
"""All files beside the shards and the manifest."""
_PROGRESS = ".progress"
_PLAN = "plan.json"
# The codec leaves nothing to compress. One record per group, because training reads at random.
_ARRAY_RECORD_OPTIONS = "group_size:1,uncompressed"
_FORMAT = "array_record"


def features() -> Any:
    """What TFDS sees in a record, a `FeaturesDict`."""
    import tensorflow_datasets as tfds  # late: it costs a third of a second

    return tfds.features.FeaturesDict(
        {
            "row_id": np.int64,
            "key": tfds.features.Text(),
            "record": tfds.features.Tensor(shape=(), dtype=np.str_),
        }
    )


def shard_name(identity: Identity, shard: int) -> str:
    """The file name that TFDS expects."""
    return f"{DATASET}-{SPLIT}.{_FORMAT}-{shard:05d}-of-{identity.shards:05d}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One record on its way into a shard.

    Attributes:
      row_id: place of the row in the corpus.
      key: content key of the row.
      data: the encoded bytes.
      tokens: tokens with targets.
      labels: of these, tokens that have a next one.
      width: the most ids of a token.
    """

    row_id: int
    key: str
    data: bytes
    tokens: int
    labels: int
    width: int


class StoreWriter:
    """Writes one store's shards, and seals the store when all are there.

    Several processes may have one each: one of them calls `begin` before, and `finish` after, all
    of them call `commit` for shards of their own.
    """

    def __init__(
        self, directory: str | os.PathLike[str], identity: Identity, token_counts: np.ndarray
    ):
        """Touches nothing yet; `token_counts` [V] of the corpus give the store's order of ids."""
        self.directory = epath.Path(directory)
        self.identity = identity
        self.codec = make_codec(identity, token_counts)
        self._token_counts = token_counts
        self._progress = self.directory / _PROGRESS

    def begin(self) -> list[int]:
        """Opens a new, half-written or finished store, and returns the shards that it lacks.

        Raises:
          InputError: the directory holds targets of another teacher, corpus or form.
        """
        finished = self._is_finished()
        plan = self._progress / _PLAN
        if finished or plan.exists():
            stored = read_manifest(self.directory).identity.to_json() if finished else None
            wanted = self.identity.to_json()
            differences = artifacts.diff(stored or artifacts.read_object(plan), wanted)
            if differences:
                raise InputError(
                    f"{self.directory}: already holds other targets ({differences[0]})"
                )
        if finished:
            # Killed between sealing the store and tidying up.
            self._progress.rmtree(missing_ok=True)
            return []
        self._progress.mkdir(parents=True, exist_ok=True)
        artifacts.write_json(plan, self.identity.to_json())
        written, told = (
            {path.name for path in directory.iterdir()}
            for directory in (self.directory, self._progress)
        )
        return [
            shard
            for shard in range(self.identity.shards)
            if shard_name(self.identity, shard) not in written
            or self._contents(shard).name not in told
        ]

    def commit(self, shard: int, records: list[Record]) -> None:
        """Writes one shard whole or not at all."""
        path = self.directory / shard_name(self.identity, shard)
        with artifacts.committed(path) as temporary:
            _write_array_record(temporary, records)
            written = artifacts.hash_file(temporary)
        artifacts.sync(self.directory)
        contents = {
            "hash": written,
            "keys": [record.key for record in records],
            "tokens": sum(record.tokens for record in records),
            "labels": sum(record.labels for record in records),
            "width": max(record.width for record in records),
        }
        artifacts.write_json(self._contents(shard), contents)

    def finish(self) -> Manifest:
        """Seals the store: index of keys, TFDS metadata, and the manifest last."""
        if not self._is_finished():
            self._seal()
            self._progress.rmtree()
        return read_manifest(self.directory)

    def _seal(self) -> None:
        shards = [artifacts.read_json(self._contents(i)) for i in range(self.identity.shards)]
        keys = np.array([key for shard in shards for key in shard["keys"]], np.bytes_)
        file = io.BytesIO()
        np.save(file, keys, allow_pickle=False)
        counts = order.counts_to_bytes(self._token_counts)
        artifacts.write_bytes(self.directory / KEYS, file.getvalue())
        artifacts.write_bytes(self.directory / TOKEN_COUNTS, counts)
        for name, data in self._metadata().items():
            artifacts.write_bytes(self.directory / name, data)
        files = {shard_name(self.identity, i): shard["hash"] for i, shard in enumerate(shards)}
        for name in SMALL_FILES:
            files[name] = artifacts.hash_file(self.directory / name)
        manifest = Manifest(
            identity=self.identity,
            width=max(shard["width"] for shard in shards),
            tokens=sum(shard["tokens"] for shard in shards),
            labels=sum(shard["labels"] for shard in shards),
            files=files,
        )
        manifest.write(self.directory)
        artifacts.sync(self.directory)

    def _metadata(self) -> dict[str, bytes]:
        """features.json and dataset_info.json, from which TFDS reads the directory."""
        import tensorflow_datasets as tfds  # late: it costs a third of a second

        names = [shard_name(self.identity, shard) for shard in range(self.identity.shards)]
        split = tfds.core.SplitInfo(
            name=SPLIT,
            shard_lengths=[len(self.identity.shard_rows(i)) for i in range(self.identity.shards)],
            num_bytes=sum(artifacts.size(self.directory / name) for name in names),
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=self.directory,
                dataset_name=DATASET,
                split=SPLIT,
                filetype_suffix=_FORMAT,
            ),
        )
        dataset = tfds.core.dataset_info.DatasetIdentity(
            name=DATASET,
            version=tfds.core.Version("1.0.0"),
            data_dir=str(self.directory),
            module_name=__name__,
        )
        info = tfds.core.DatasetInfo(builder=dataset, features=features())
        info.set_file_format(_FORMAT)
        info.set_splits(tfds.core.splits.SplitDict([split]))
        # Where nothing stays of it if this is the end of the process.
        place = None if artifacts.is_remote(self.directory) else self._progress
        with tempfile.TemporaryDirectory(dir=place) as temporary, artifacts.naming(temporary):
            info.write_to_directory(temporary)
            return {path.name: path.read_bytes() for path in epath.Path(temporary).iterdir()}

    def _is_finished(self) -> bool:
        return (self.directory / MANIFEST).exists()

    def _contents(self, shard: int) -> epath.Path:
        return self._progress / f"{shard:05d}.json"


def read_keys(directory: epath.Path) -> np.ndarray:
    """The rows' content keys, bytes [rows], in the order of the rows."""
    with (directory / KEYS).open("rb") as file:
        return np.load(io.BytesIO(file.read()), allow_pickle=False)


def _write_array_record(path: epath.Path, records: list[Record]) -> None:
    import tensorflow_datasets as tfds  # late: it costs a third of a second

    serializer = tfds.core.example_serializer.ExampleSerializer(features().get_serialized_info())
    writer = array_record_module.ArrayRecordWriter(str(path), _ARRAY_RECORD_OPTIONS)
    with _disk_errors(), contextlib.closing(writer):
        for record in records:
            example: dict[str, Any] = {
                "row_id": record.row_id,
                "key": record.key,
                "record": record.data,
            }
            # TFDS's own `serialize_example` leaves the order of a protobuf map to chance.
            proto = serializer.get_tf_example(example)
            writer.write(proto.SerializeToString(deterministic=True))


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """Makes the OSError that it is of what ArrayRecord raises; its message names the file."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error)) from error
