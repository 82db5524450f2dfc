"""Rows in a TFDS dataset: ArrayRecord files, in the order in which the rows came, no TensorFlow."""

import contextlib
import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import writer
from tensorflow_datasets.proto import tf_example_pb2

from distill_jax import artifacts

_NAME, _VERSION = "corpus", "1.0.0"


class _CanonicalWriter(writer.ExampleWriter):
    """Writes records whose bytes depend on their content alone.

    A record is a protocol buffer with a map, and a map is serialised in an order that changes from
    one process to the next unless asked otherwise, which TFDS does not.
    """

    def write(self, path, examples):
        """Writes one shard from (key, serialised example) pairs."""
        canonical = ((key, _canonical(example)) for key, example in examples)
        if not artifacts.is_remote(path):
            return super().write(path, canonical)
        with artifacts.committed(path) as local:  # ArrayRecord knows no object store
            return super().write(local, canonical)


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
        splits: Any,
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


class _BeamRowsBuilder(_RowsBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Rows that come out of a Beam pipeline, which `splits` adds to: (row_id, row) of each."""

    name = _NAME

    def _split_generators(self, dl_manager, pipeline=None) -> dict[str, Any]:
        return self._splits(pipeline)


def write_dataset(
    directory: epath.Path,
    splits: Mapping[str, Iterable[Mapping[str, Any]]],
    *,
    sequence_length: int,
) -> None:
    """Writes the dataset anew; what an interrupted call left is removed first."""
    _write(_RowsBuilder, directory, splits, sequence_length, None)


def write_dataset_on_beam(
    directory: epath.Path,
    splits: Callable[[Any], Mapping[str, Any]],
    *,
    sequence_length: int,
    runner: str,
    options: Any,
) -> None:
    """`write_dataset` in a Beam pipeline.

    Args:
      directory: where.
      splits: adds to a pipeline and returns, for each split, a collection of (row_id, row).
      sequence_length: of a row.
      runner: Beam's name of what runs the pipeline.
      options: Beam's PipelineOptions.
    """
    config = tfds.download.DownloadConfig(beam_runner=runner, beam_options=options)
    _write(_BeamRowsBuilder, directory, splits, sequence_length, config)


def _write(
    make: type[_RowsBuilder], directory: epath.Path, splits: Any, sequence_length: int, config: Any
) -> None:
    (directory / _NAME).rmtree(missing_ok=True)
    builder = make(splits, sequence_length=sequence_length, data_dir=directory)
    tfds.disable_progress_bar()
    # TFDS prints to stdout, where a command's result goes.
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(download_config=config)


def open_dataset(directory: epath.Path, split: str):
    """Random access to the rows of one split, as they were written."""
    return tfds.builder_from_directory(directory / _NAME / _VERSION).as_data_source(split=split)
