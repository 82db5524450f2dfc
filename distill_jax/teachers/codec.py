"""The bytes of one record: what a teacher says about one row of the corpus.

    crc32 | numbers of column 1 | numbers of column 2 | ...

The checksum, 4 bytes little-endian, is of "teacher:key" in ASCII (the teacher's fingerprint, the
row's content key) and of everything behind it, so that a record that ended up at another row
or in another store is noticed. All numbers together are packed as `bits` describes. A column
has a number for every one of the row's T tokens, or as many for each as an earlier column
counts, token after token. What a number n means:

- whole numbers (how many ids, how often an id was drawn): n itself;
- reals (nats): n / steps. With steps = 32 they lie on a grid of 1/32, with steps = -64 they are
  not positive and n = 0, 1, 2 are 0, -1/64, -1/32; n = 2^24 - 1 is infinite;
- ids, of which rare ones are large: their *rank* in the corpus (0 the most frequent id, equals
  by id), less the rank before it in the same run. A token's ids make one run, or two if some other
  column is counted by a smaller count: the ids that have such a value, and those behind. Ranks
  rise in a run, the first stands for itself, and all values of a token are in the order of its ids.

A real is rounded to one of its two neighbours on the grid by chance, such that its mean, or
the mean of its exponential, is right; chance comes from the teacher, the row's key and the place
at which the value was given, and not from the order of ids, which is the corpus's. So a row of two
corpora is rounded alike, and what is on the grid stays: what was decoded is encoded without loss. A
log-probability x is stored within 1/|steps| of x, hence p within a factor exp(1/|steps|), and
the mean of what is stored for p is p: between neighbours a > p > b it becomes b with
probability (a - p) / (a - b).

Everything is vectorised NumPy.
"""

import dataclasses
import functools
import hashlib
import zlib
from collections.abc import Mapping

import numpy as np

from distill_jax.teachers import bits

CODEC_VERSION = 2
"""Grows whenever bytes of one version could not be read by another."""
IDS = "ids"
"""The column of ids, which every record has."""
_CHECKSUM_BYTES = 4
_INFINITE = (1 << 24) - 1
_WHOLE_LIMIT = 1 << 31


class CorruptRecord(ValueError):
    """The bytes of a record are not what was written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """One kind of value in a record.

    Attributes:
      name: the array that it holds; `IDS` for the ids.
      counted_by: None for one value per token, or the column of whole numbers that says how
        many values each token has; that column stands earlier in the record.
      steps: None for whole numbers; for reals the steps of the grid in one unit, negative if
        the values are.
      mean_of_exp: reals are rounded so that the mean of exp(value) is right, not of the value.
      fill: the value that decoding puts behind a token's last one.
    """

    name: str
    counted_by: str | None = None
    steps: int | None = None
    mean_of_exp: bool = False
    fill: float = 0


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Codec:
    """Encodes and decodes the records of one store.

    Attributes:
      columns: the layout; the counts stand in front of what they count.
      order: the ids from the most frequent to the rarest, int [V].
      tokens: tokens of a row, T.
      teacher: fingerprint of the teacher.
    """

    columns: tuple[Column, ...]
    order: np.ndarray
    tokens: int
    teacher: str

    def encode(self, arrays: Mapping[str, np.ndarray], key: str) -> bytes:
        """The record of one row.

        Args:
          arrays: for every column [T], or [T, width] of which each token's first few count.
          key: the row's content key.

        Raises:
          ValueError: an id is outside the vocabulary, a whole number negative, or a real NaN.
        """
        packed, _ = bits.pack(self._to_numbers(arrays, key))
        return self._checksum(packed, key) + packed

    def decode(self, record: bytes, key: str, width: int) -> dict[str, np.ndarray]:
        """The arrays of one row: [T] for a column of one value per token, else [T, width].

        Integers are int32, reals float32. The ids of a token are in the order of their ranks.

        Raises:
          CorruptRecord: the checksum does not fit, or the record is of another layout.
        """
        numbers = self._unpack(record, key, width)
        places = {name: _places(numbers[name], width) for name in self._counts if name}
        arrays: dict[str, np.ndarray] = {}
        for column in self.columns:
            values = self._from_numbers(column, numbers)
            if column.counted_by is not None:
                padded = np.full((self.tokens, width), column.fill, values.dtype)
                padded.ravel()[places[column.counted_by]] = values
                values = padded
            arrays[column.name] = values
        return arrays

    def part_bytes(self, record: bytes, key: str, width: int) -> dict[str, float]:
        """Bytes that each column of a record takes, and "frame", the rest.

        Raises:
          CorruptRecord: as `decode`.
        """
        numbers = self._unpack(record, key, width)
        _, sizes = bits.pack(numbers.values())
        parts = dict(zip(numbers, sizes))
        return parts | {"frame": len(record) - sum(sizes)}

    @functools.cached_property
    def _rank(self) -> np.ndarray:
        rank = np.empty(len(self.order), np.int64)
        rank[self.order] = np.arange(len(self.order))
        return rank

    @functools.cached_property
    def _counts(self) -> tuple[str, str | None]:
        """Names of the column that counts the ids, and of the one that counts fewer, if any."""
        counted_by = {column.name: column.counted_by for column in self.columns}
        every = counted_by[IDS]
        fewer = set(counted_by.values()) - {None, every}
        if every is None or len(fewer) > 1:
            raise ValueError(f"ids are counted by {every}, other columns by {fewer or None}")
        return every, next(iter(fewer), None)

    def _runs(self, counts: Mapping[str, np.ndarray]) -> np.ndarray:
        """How many ids each run has, run after run, int64 [T or 2 T]."""
        every, fewer = self._counts
        lengths = np.asarray(counts[every], np.int64)
        if fewer is None:
            return lengths
        first = np.asarray(counts[fewer], np.int64)
        return np.stack((first, lengths - first), axis=1).ravel()

    def _checksum(self, packed: bytes | memoryview, key: str) -> bytes:
        start = zlib.crc32(f"{self.teacher}:{key}".encode())
        return zlib.crc32(packed, start).to_bytes(_CHECKSUM_BYTES, "little")

    def _to_numbers(self, arrays: Mapping[str, np.ndarray], key: str) -> list[np.ndarray]:
        """The numbers of every column, flat."""
        chance = _chance(f"{self.teacher}:{key}")
        places, gaps = self._sorted(arrays)
        kinds = []
        for column in self.columns:
            values = np.asarray(arrays[column.name])
            given = np.arange(self.tokens)
            if column.counted_by is not None:
                counts = np.asarray(arrays[column.counted_by], np.int64)
                token, slot = np.divmod(places, values.shape[1])
                values = values.ravel()[places[slot < counts[token]]]
                given = (np.cumsum(counts) - counts)[token] + slot
                given = given[slot < counts[token]]
            if column.name == IDS:
                values = gaps
            elif column.steps is not None:
                values = _on_grid(values, column, _uniform(chance, len(values))[given])
            kinds.append(values)
        return kinds

    def _sorted(self, arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Where the ids lie in [T, width], in the order of the record, and their ranks' gaps."""
        ids, runs, vocab = np.asarray(arrays[IDS]), self._runs(arrays), len(self.order)
        width = ids.shape[1]
        places = _places(np.asarray(arrays[self._counts[0]]), width)
        kept = ids.ravel()[places]
        if kept.size and not 0 <= kept.min() <= kept.max() < vocab:
            raise ValueError(f"ids: from {kept.min()} to {kept.max()}, the vocabulary has {vocab}")
        # Run, rank and place in one integer, which sorts faster than an index, and the same
        # everywhere since no two are equal.
        run = np.repeat(np.arange(len(runs)), runs)
        combined = np.sort((run * vocab + self._rank[kept]) * max(width, 1) + places % width)
        rank = combined // width % vocab
        gaps = np.diff(rank, prepend=0)
        starts = (np.cumsum(runs) - runs)[runs > 0]
        gaps[starts] = rank[starts]
        return places - places % width + combined % width, gaps

    def _unpack(self, record: bytes, key: str, width: int) -> dict[str, np.ndarray]:
        """The numbers of every column, flat."""
        packed = memoryview(record)[_CHECKSUM_BYTES:]
        if self._checksum(packed, key) != record[:_CHECKSUM_BYTES]:
            raise CorruptRecord("its checksum does not fit")
        a_token = sum(1 if column.counted_by is None else width for column in self.columns)
        try:
            every_number = bits.unpack(packed, at_most=self.tokens * a_token)
        except bits.Unreadable as error:
            raise CorruptRecord(str(error)) from error
        numbers: dict[str, np.ndarray] = {}
        start = 0
        for column in self.columns:
            count = self.tokens
            if column.counted_by is not None:
                count = int(numbers[column.counted_by].sum())
            stop = start + count
            if stop > len(every_number):
                raise CorruptRecord(f"it ends inside column {column.name!r}")
            numbers[column.name] = every_number[start:stop]
            start = stop
        if start != len(every_number):
            raise CorruptRecord(f"it has {len(every_number) - start} numbers too many")
        self._check_counts(numbers, width)
        return numbers

    def _check_counts(self, numbers: Mapping[str, np.ndarray], width: int) -> None:
        every, fewer = self._counts
        most = int(numbers[every].max(initial=0))
        if most > width:
            raise CorruptRecord(f"a token has {most} ids, the store {width}")
        if fewer is not None and (numbers[fewer] > numbers[every]).any():
            raise CorruptRecord(f"a token has more in {fewer!r} than in {every!r}")

    def _from_numbers(self, column: Column, numbers: Mapping[str, np.ndarray]) -> np.ndarray:
        values = numbers[column.name]
        if column.steps is not None:
            reals = values.astype(np.float32) / np.float32(column.steps)
            return np.where(values < _INFINITE, reals, np.copysign(np.float32(np.inf), reals))
        limit = _WHOLE_LIMIT
        if column.name == IDS:
            values, limit = _running_sums(values, self._runs(numbers)), len(self.order)
        largest = int(values.max(initial=0))
        if largest >= limit:
            raise CorruptRecord(f"{column.name} reach {largest}, the end is {limit - 1}")
        return self.order[values] if column.name == IDS else values.astype(np.int32)


def _places(lengths: np.ndarray, width: int) -> np.ndarray:
    """Places in [T, width], flat, of each token's first `lengths` [T] values."""
    lengths = lengths.astype(np.int64)
    before = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(
        np.arange(len(lengths)) * width - before, lengths
    )


def _running_sums(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Cumulative sums that begin anew with each of the runs of `lengths` values."""
    sums = np.concatenate(([0], np.cumsum(values)))
    starts = np.cumsum(lengths) - lengths
    return sums[1:] - np.repeat(sums[starts], lengths)


def _chance(seed: str) -> np.random.Philox:
    """A source of random bits, which NumPy keeps the same in every version."""
    digest = hashlib.sha256(f"rounding:{seed}".encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little"))


def _uniform(chance: np.random.Philox, count: int) -> np.ndarray:
    """Numbers in [0, 1), float64 [count]."""
    return (chance.random_raw(count) >> np.uint64(11)) * 2.0**-53


def _on_grid(values: np.ndarray, column: Column, uniform: np.ndarray) -> np.ndarray:
    """Reals to numbers, rounded by chance so that means are right."""
    assert column.steps is not None
    with np.errstate(over="ignore"):
        scaled = np.clip(values.astype(np.float64) * column.steps, 0, _INFINITE)
    if np.isnan(scaled).any():
        raise ValueError(f"{column.name}: is NaN")
    below = np.floor(scaled)
    share = scaled - below
    if column.mean_of_exp:
        # Between e^(n / steps) and e^((n + 1) / steps), not between n and n + 1.
        share = np.expm1(share / column.steps) / np.expm1(1 / column.steps)
    return np.where(scaled < _INFINITE, below + (uniform < share), _INFINITE)
