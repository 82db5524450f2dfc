"""Ways to store the same targets: ours, and what others do.

A format writes rows into a directory and gives a source of rows, each {"ids", "weights"}
[T, width], "entropy" and "label_log_prob" [T]; it may be read in any order from several threads.
What pads and what stays ragged is as the format's users do it.
"""

import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
from array_record.python import array_record_module
from problem import Corpus, Problem

from distill_jax import teachers
from distill_jax.teachers.manifest import Identity
from distill_jax.teachers.shards import StoreWriter
from distill_jax.teachers.writer import encode_row

Row = Mapping[str, np.ndarray]


class Format(Protocol):
    """A way to store rows."""

    name: str

    def write(self, directory: pathlib.Path, rows: list[Row]) -> None: ...

    def source(self, directory: pathlib.Path) -> Callable[[int], dict[str, Any]]: ...


class Ours(Format):
    """A store, from the arrays that the scheme gives to the arrays that training takes."""

    name = "distill_jax"

    def __init__(self, problem: Problem, rows: int):
        self._problem, self._corpus = problem, Corpus(problem, rows)

    def write(self, directory, rows):
        problem, corpus = self._problem, self._corpus
        identity = Identity(
            teacher="bench", tokenizer=corpus.tokenizer_fingerprint, corpus=corpus.fingerprint,
            rows=len(corpus), rows_per_shard=teachers.WriteConfig().rows_per_shard,
            sequence_length=corpus.sequence_length, vocab_size=problem.vocab, temperature=1.0,
            scheme=problem.scheme,
        )  # fmt: skip
        writer = StoreWriter(directory, identity, problem.token_counts)
        for shard in writer.begin():
            records = []
            for row in identity.shard_rows(shard):
                about = corpus[row]
                arrays = problem.rows[row % len(problem.rows)]
                segment_ids, key = about["segment_ids"], about["key"]
                records.append(encode_row(writer.codec, arrays, segment_ids, row_id=row, key=key))
            writer.commit(shard, records)
        writer.finish()

    def source(self, directory):
        joined = teachers.join(self._corpus, {"teacher": teachers.open_store(directory)})
        return lambda row: joined[row]["targets"]["teacher"]


class Npz(Format):
    name = "npz, compressed"

    def write(self, directory, rows):
        for index, row in enumerate(rows):
            np.savez_compressed(directory / f"{index}.npz", allow_pickle=False, **row)

    def source(self, directory):
        return lambda row: dict(np.load(directory / f"{row}.npz", allow_pickle=False))


class Safetensors(Format):
    name = "safetensors"

    def write(self, directory, rows):
        for index, row in enumerate(rows):
            safetensors.numpy.save_file(dict(row), directory / f"{index}.safetensors")

    def source(self, directory):
        return lambda row: safetensors.numpy.load_file(directory / f"{row}.safetensors")


class Parquet(Format):
    """Ragged lists, a row group for each row of the corpus."""

    name = "parquet + zstd"

    def write(self, directory, rows):
        schema = _table(rows[0]).schema
        with pq.ParquetWriter(directory / "0.parquet", schema, compression="zstd") as writer:
            for row in rows:
                writer.write_table(_table(row))

    def source(self, directory):
        path = directory / "0.parquet"
        width = int(pq.ParquetFile(path).schema_arrow.metadata[b"width"])

        def read(row):
            table = pq.ParquetFile(path).read_row_group(row).combine_chunks()
            arrays = {name: table[name].to_numpy() for name in ("entropy", "label_log_prob")}
            for name in ("ids", "weights"):
                lists = table[name].chunk(0)
                lengths = np.diff(lists.offsets.to_numpy())
                values = lists.flatten().to_numpy()
                padded = np.zeros((len(lengths), width), values.dtype)
                padded[np.arange(width) < lengths[:, None]] = values
                arrays[name] = padded
            return arrays

        return read


def _table(row: Row) -> pa.Table:
    kept = row["weights"] > 0
    offsets = np.append(0, np.cumsum(kept.sum(axis=1))).astype(np.int32)
    columns = {name: pa.array(row[name]) for name in ("entropy", "label_log_prob")}
    for name in ("ids", "weights"):
        columns[name] = pa.ListArray.from_arrays(offsets, row[name][kept])
    return pa.table(columns).replace_schema_metadata({"width": str(kept.shape[1])})


class RawArrayRecord(Format):
    """A record of raw arrays for each row, as MaxText keeps a teacher's top k, under zstd."""

    name = "raw ArrayRecord"

    def write(self, directory, rows):
        writer = array_record_module.ArrayRecordWriter(
            str(directory / "0.array_record"), "group_size:1"
        )
        for row in rows:
            writer.write(b"".join(row[name].tobytes() for name in _RAW))
        writer.close()
        self._shapes = {name: (rows[0][name].shape, rows[0][name].dtype) for name in _RAW}

    def source(self, directory):
        reader = array_record_module.ArrayRecordReader(str(directory / "0.array_record"))

        def read(row):
            record, start, arrays = reader.read([row])[0], 0, {}
            for name, (shape, dtype) in self._shapes.items():
                count = int(np.prod(shape))
                arrays[name] = np.frombuffer(record, dtype, count, start).reshape(shape)
                start += count * dtype.itemsize
            return arrays

        return read


_RAW = ("ids", "weights", "entropy", "label_log_prob")


class DistillKit(Format):
    """Weights in bfloat16 by DistillKit's own code; lists of bytes in parquet.

    It has no ragged form, so k is the width, and no entropy or label. `checkout` is a clone of
    arcee-ai/DistillKit.
    """

    name = "DistillKit"

    def __init__(self, checkout: str, vocab: int, ids: int):
        import torch

        # Its compression alone: the package itself imports a whole trainer.
        sys.path.insert(0, checkout)
        from distillkit.compression.compressor import LogprobCompressor
        from distillkit.compression.config import DistributionQuantizationConfig, TermDtype

        self._torch, self._ids = torch, ids
        self._compressor = LogprobCompressor(
            DistributionQuantizationConfig(
                d=vocab, k=ids, exact_k=ids, exact_dtype=TermDtype.BFLOAT16,
                polynomial_terms=None, residual_bins=[], delta_encoding=False,
            )
        )  # fmt: skip

    def write(self, directory, rows):
        torch, writer = self._torch, None
        for row in rows:
            with np.errstate(divide="ignore"):
                logs = torch.from_numpy(np.log(row["weights"]))
            top, place = torch.topk(logs, self._ids, dim=-1)
            ids = torch.from_numpy(row["ids"]).long().gather(-1, place)
            packed = self._compressor.compress_from_sparse(ids, top)
            table = pa.table(
                {
                    name: pa.FixedSizeListArray.from_arrays(
                        pa.array(value.numpy().ravel()), value.shape[-1]
                    )
                    for name, value in packed.items()
                }
            )
            writer = writer or pq.ParquetWriter(
                directory / "0.parquet", table.schema, compression="zstd"
            )
            writer.write_table(table)
        writer.close()

    def source(self, directory):
        torch, path = self._torch, directory / "0.parquet"

        def read(row):
            table = pq.ParquetFile(path).read_row_group(row).combine_chunks()
            packed = {
                name: torch.from_numpy(
                    table[name].chunk(0).flatten().to_numpy().reshape(table.num_rows, -1).copy()
                )
                for name in table.column_names
            }
            ids, logs = self._compressor.decompress_to_sparse(packed)
            return {"ids": ids.int().numpy(), "weights": logs.float().exp().numpy()}

        return read


def peers(problem: Problem, distillkit: str | None = None) -> list[Format]:
    """Every format but ours; DistillKit's only where a checkout is given."""
    theirs = (
        [DistillKit(distillkit, problem.vocab, problem.rows[0]["ids"].shape[1])]
        if distillkit
        else []
    )
    return [Npz(), Safetensors(), Parquet(), RawArrayRecord(), *theirs]
