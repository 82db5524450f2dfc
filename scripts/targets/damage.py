"""A store's files with one bit flipped, or cut short: reading refuses, or still reads what was.

A record has checksums of its own and in ArrayRecord's chunks. What lies between records and
behind the last is never read, so damage there shows in the shard's hash alone: every fault here
must change the hash that `verify` looks at, and must not change what a reader gets.
"""

import copy
import mmap
import pathlib
import signal
import tempfile
from collections.abc import Callable, Sequence

import numpy as np
import victim
from tally import Tally

from distill_jax import artifacts, teachers
from distill_jax.artifacts import InputError

# Rows whose records fill the first 64 KiB of their shard, as nearly as they go.
CORPUS = victim.Corpus(rows=17, sequence_length=220)
_BLOCK = 1 << 16
_STORE = "threshold"
# Nothing here takes a hundredth of it: whoever does hangs.
_HANGS_AFTER_S = 20


def flips(path: pathlib.Path, bits: Sequence[int]) -> Tally:
    """Flips single bits of a file of a store, all in turn."""
    data = path.read_bytes()

    def damaged(bit: int) -> bytes:
        place, mask = bit // 8, 1 << bit % 8
        return data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :]

    return _damage(f"bit of {_short(path)} flipped", path, bits, damaged)


def cuts(path: pathlib.Path, lengths: Sequence[int]) -> Tally:
    """Cuts a file of a store to lengths, all in turn."""
    data = path.read_bytes()
    return _damage(f"{_short(path)} cut short", path, lengths, lambda length: data[:length])


def measure(part: int) -> list[Tally]:
    """Faults of every file of a store: one of `part`."""
    rng = np.random.default_rng(0)

    def some(faults: int) -> list[int]:
        return rng.permutation(faults)[: -(-faults // part)].tolist()

    with tempfile.TemporaryDirectory() as parent:
        assert victim.wait(victim.start(lambda: victim.write(parent, CORPUS, CORPUS.rows))) == 0
        tallies = []
        for path in sorted((pathlib.Path(parent) / _STORE).iterdir()):
            size = path.stat().st_size
            # At these lengths ArrayRecord finds nothing wrong, and no records.
            blocks = range(0, size, _BLOCK)
            tallies += [flips(path, some(8 * size)), cuts(path, sorted({*blocks, *some(size)}))]
        return tallies


def _short(path: pathlib.Path) -> str:
    return "a shard" if "array_record" in path.name else path.name


def _damage(
    kind: str, path: pathlib.Path, faults: Sequence[int], damaged: Callable[[int], bytes]
) -> Tally:
    """Damages a file in turn, in a process that may crash: then the next goes on behind."""
    original = path.read_bytes()
    # Next fault, faults that were survived, faults that reading refused.
    counted = np.frombuffer(mmap.mmap(-1, 24), np.int64)
    tally = Tally(kind)

    def work() -> None:
        path.write_bytes(original)
        reader = _Reader(path)
        for number in range(counted[0], len(faults)):
            signal.alarm(_HANGS_AFTER_S)
            path.write_bytes(damaged(faults[number]))
            counted[2] += reader.refuses()
            counted[1] += 1
            counted[0] += 1
        signal.alarm(0)

    while victim.wait(victim.start(work)) and counted[0] < len(faults):
        tally.count(False, f"fault {faults[counted[0]]}")
        counted[0] += 1
    path.write_bytes(original)
    tally.count(True, "", int(counted[1]))
    tally.note = f"{counted[2]:,} refused by reading, all by the hash"
    return tally


class _Reader:
    """Reads a store whose one file is damaged, and knows what it held before."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._hash = artifacts.hash_file(path)
        self._is_shard = "array_record" in path.name
        self._store = teachers.open_store(path.parent)
        self._records = self._store._records
        self._raw = [self._records.data_source[row] for row in range(len(self._store))]
        self._rows = [self._store[row] for row in range(len(self._store))]

    def refuses(self) -> bool:
        """Whether reading ends in an InputError.

        Raises:
          AssertionError: reading gives something else than before, or the hash is as before.
          Exception: whatever else than an InputError reading ended in.
        """
        assert artifacts.hash_file(self._path) != self._hash, "the hash is as before"
        return self._refuses_rows() if self._is_shard else self._refuses_opening()

    def _refuses_opening(self) -> bool:
        try:
            store = teachers.open_store(self._path.parent)
            for row, expected in enumerate(self._rows):
                _check_same(store[row], expected)
        except InputError:
            return True
        return False

    def _refuses_rows(self) -> bool:
        """Decodes only rows whose bytes differ: equal bytes decode to equal arrays."""
        refused = False
        # A copy opens the shard anew.
        source = self._records.data_source = copy.copy(self._records.data_source)
        for row, raw in enumerate(self._raw):
            try:
                if source[row] == raw:
                    continue
            except Exception:  # what our reader makes of it is asked next
                pass
            try:
                _check_same(self._store[row], self._rows[row])
            except InputError:
                refused = True
        return refused


def _check_same(row: dict, expected: dict) -> None:
    assert (row["row_id"], row["key"]) == (expected["row_id"], expected["key"])
    for name, values in expected["targets"].items():
        np.testing.assert_array_equal(row["targets"][name], values)
