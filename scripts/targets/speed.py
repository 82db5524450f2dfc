"""Tokens a second, written and read back in training's way, of our stores and of other formats.

Writing takes arrays as a scheme gives them (for the others: as training takes them) to files that
are whole and, ours alone, on disk (fsync) and hashed. Reading goes through the batches of
training (Grain, four threads, rows shuffled): read, decode, join with the corpus, pad, stack. Files
are in the page cache. Each figure is the best of its repeats.
"""

import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable

import formats
from problem import Corpus, Problem

from distill_jax import data

_BATCH_ROWS = 4


class Source:
    """The corpus with a format's rows beside it."""

    def __init__(self, corpus: Corpus, read: Callable[[int], dict]):
        self._corpus, self._read = corpus, read

    def __len__(self):
        return len(self._corpus)

    def __getitem__(self, index):
        return {**self._corpus[index], "targets": {"teacher": self._read(index)}}


def measure(problem: Problem, rows: int, repeats: int, peers: list[formats.Format]) -> dict:
    """{format: {"write_tokens_per_s", "read_tokens_per_s"}} of stores of so many rows."""
    found: dict[str, dict[str, float]] = {}
    corpus = Corpus(problem, rows)
    distinct = [problem.scheme.unpack(row) for row in problem.rows]
    unpacked = [distinct[row % len(distinct)] for row in range(rows)]
    with tempfile.TemporaryDirectory() as scratch:
        for form in [formats.Ours(problem, rows), *peers]:
            place = pathlib.Path(scratch) / "rows"
            seconds: dict[str, list[float]] = {"write": [], "read": []}
            for _ in range(repeats):
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir()
                start = time.perf_counter()
                form.write(place, unpacked)
                seconds["write"].append(time.perf_counter() - start)
                source = Source(corpus, form.source(place))
                start = time.perf_counter()
                for _ in data.batches(source, batch_rows=_BATCH_ROWS, seed=0, epochs=1):
                    pass
                seconds["read"].append(time.perf_counter() - start)
            tokens = rows * corpus.sequence_length
            found[form.name] = {
                f"{way}_tokens_per_s": tokens / min(times) for way, times in seconds.items()
            }
    return found
