"""The bytes of one record: what a teacher says about one row of the corpus.

A record is its columns one after another, little-endian, behind a checksum. A column holds
one value for every token, or as many for each token as an earlier column counts:

    crc32 | length [T] | entropy [T] | ids [sum of length] | counts [sum of length]

Everything is vectorised NumPy. The checksum covers the row's content key too, so that a
record that ended up at another row is noticed.
"""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

CODEC_VERSION = 1
"""Grows whenever bytes of one version could not be read by another."""
_CHECKSUM_BYTES = 4


class CorruptRecord(ValueError):
    """The bytes of a record are not what was written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """One kind of value in a record.

    Attributes:
      name: the array that it holds.
      dtype: how a value is stored: a NumPy dtype, or "uint24".
      counted_by: None for one value per token, or the integer column that says how many
        values each token has; that column stands earlier in the record.
      fill: the value that decoding puts behind a token's last one.
    """

    name: str
    dtype: str
    counted_by: str | None = None
    fill: float = 0

    @property
    def item_bytes(self) -> int:
        """Bytes of one value."""
        return 3 if self.dtype == "uint24" else np.dtype(self.dtype).itemsize


def unsigned(largest: int) -> str:
    """The narrowest stored dtype that holds every integer from 0 to `largest`."""
    for bits in (8, 16, 24):
        if largest < 1 << bits:
            return f"uint{bits}"
    return "uint32"


def encode(columns: Sequence[Column], arrays: Mapping[str, np.ndarray], key: str) -> bytes:
    """The record of one row.

    Args:
      columns: the layout.
      arrays: for every column [T], or [T, width] of which each token's first few count.
      key: the row's content key.
    """
    parts = []
    for column in columns:
        values = np.asarray(arrays[column.name])
        if column.counted_by is not None:
            values = values[_occupied(arrays[column.counted_by], values.shape[1])]
        parts.append(_to_bytes(values, column.dtype))
    body = b"".join(parts)
    return _checksum(body, key) + body


def decode(
    columns: Sequence[Column], record: bytes, key: str, *, tokens: int, width: int
) -> dict[str, np.ndarray]:
    """The arrays of one row: [T] for a column of one value per token, else [T, width].

    Raises:
      CorruptRecord: the checksum or the size is wrong.
    """
    body = memoryview(record)[_CHECKSUM_BYTES:]
    if _checksum(body, key) != record[:_CHECKSUM_BYTES]:
        raise CorruptRecord("its checksum does not fit")
    arrays: dict[str, np.ndarray] = {}
    start = 0
    for column in columns:
        lengths = None if column.counted_by is None else arrays[column.counted_by]
        count = tokens if lengths is None else int(lengths.sum())
        stop = start + count * column.item_bytes
        if stop > len(body):
            raise CorruptRecord(f"it ends inside column {column.name!r}")
        values = _from_bytes(body[start:stop], column.dtype)
        arrays[column.name] = values if lengths is None else _padded(values, lengths, width, column)
        start = stop
    if start != len(body):
        raise CorruptRecord(f"{len(body) - start} bytes too many")
    return arrays


def column_bytes(columns: Sequence[Column], arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Bytes that each column of a decoded record takes, and the checksum's."""
    sizes = {"checksum": _CHECKSUM_BYTES}
    for column in columns:
        counted = arrays[column.name if column.counted_by is None else column.counted_by]
        count = counted.size if column.counted_by is None else int(counted.sum())
        sizes[column.name] = count * column.item_bytes
    return sizes


def _checksum(body: bytes | memoryview, key: str) -> bytes:
    return zlib.crc32(body, zlib.crc32(key.encode())).to_bytes(_CHECKSUM_BYTES, "little")


def _occupied(lengths: np.ndarray, width: int) -> np.ndarray:
    return np.arange(width) < np.asarray(lengths)[:, None]


def _padded(values: np.ndarray, lengths: np.ndarray, width: int, column: Column) -> np.ndarray:
    if lengths.size and int(lengths.max()) > width:
        raise CorruptRecord(f"a token has {int(lengths.max())} {column.name}, the store {width}")
    padded = np.full((len(lengths), width), column.fill, values.dtype)
    padded[_occupied(lengths, width)] = values
    return padded


def _to_bytes(values: np.ndarray, dtype: str) -> bytes:
    if dtype != "uint24":
        # A log-probability below float16's range is that of an impossible id: -inf.
        with np.errstate(over="ignore"):
            return values.astype(np.dtype(dtype).newbyteorder("<")).tobytes()
    return values.astype("<u4").reshape(-1, 1).view(np.uint8)[:, :3].tobytes()


def _from_bytes(data: memoryview, dtype: str) -> np.ndarray:
    """Integers as int32 (uint32 as int64), floats as float32."""
    if dtype == "uint24":
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, :3] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        return wide.view("<i4").ravel()
    values = np.frombuffer(data, np.dtype(dtype).newbyteorder("<"))
    if values.dtype.kind == "f":
        return values.astype(np.float32)
    return values.astype(np.int64 if values.dtype.itemsize == 4 else np.int32)
