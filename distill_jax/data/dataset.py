"""Rows in a TFDS dataset: ArrayRecord files, in the order in which the rows came, no TensorFlow."""

import contextlib
import io
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import writer
from tensorflow_datasets.proto import tf_example_pb2

_NAME, _VERSION = "corpus", "1.0.0"


class _CanonicalWriter(writer.ExampleWriter):
    """Writes records whose bytes depend on their content alone.

    A record is a protocol buffer with a map, and a map is serialised in an order that changes from
    one process to the next unless asked otherwise, which TFDS does not.
    """

    def write(self, path, examples):
        """Writes one shard from (key, serialised example) pairs."""
        return super().write(path, ((key, _canonical(example)) for key, example in examples))


def _canonical(example: bytes) -> bytes:
    return tf_example_pb2.Example.FromString(example).SerializeToString(deterministic=True)


class _RowsBuilder(tfds.core.GeneratorBasedBuilder):
    """Rows of one length, handed over split by split."""

    name = _NAME
    VERSION = tfds.core.Version(_VERSION)
    # No download, so no checksums beside the code. TFDS would look for them with the package
    # importlib_resources, which it does not install.
    code_path = None

    def __init__(
        self,
        splits: Mapping[str, Iterable[Mapping[str, Any]]],
        *,
        sequence_length: int,
        data_dir: epath.Path,
    ):
        self._splits, self._sequence_length = splits, sequence_length
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        # Built directly: `dataset_info_from_configs` looks for files beside the module.
        row = tfds.features.Tensor(shape=(self._sequence_length,), dtype=np.int32)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Token rows of one length, packed from whole passages.",
            features=tfds.features.FeaturesDict(
                {
                    "row_id": tfds.features.Scalar(np.int64),
                    "key": tfds.features.Text(),
                    "tokens": row,
                    "segment_ids": row,
                }
            ),
            disable_shuffling=True,
        )

    def _example_writer(self) -> _CanonicalWriter:
        return _CanonicalWriter(file_format=self.info.file_format)

    def _split_generators(self, dl_manager) -> dict[str, Any]:
        return {split: self._generate_examples(rows) for split, rows in self._splits.items()}

    def _generate_examples(self, rows):
        for row in rows:
            yield row["row_id"], row


def write_dataset(
    directory: epath.Path,
    splits: Mapping[str, Iterable[Mapping[str, Any]]],
    *,
    sequence_length: int,
) -> None:
    """Writes the dataset anew; what an interrupted call left is removed first."""
    (directory / _NAME).rmtree(missing_ok=True)
    builder = _RowsBuilder(splits, sequence_length=sequence_length, data_dir=directory)
    tfds.disable_progress_bar()
    # TFDS prints to stdout, where a command's result goes.
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()


def open_dataset(directory: epath.Path, split: str):
    """Random access to the rows of one split, as they were written."""
    return tfds.builder_from_directory(directory / _NAME / _VERSION).as_data_source(split=split)
