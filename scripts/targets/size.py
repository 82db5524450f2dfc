"""Bytes that stored targets take, everything counted, by part and beside other formats."""

import pathlib
import tempfile

import formats
from problem import Problem

from distill_jax import teachers


def directory_bytes(directory: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def measure(problem: Problem, rows: int, peers: list[formats.Format]) -> dict:
    """Bytes a token and an id of a store of so many rows, and of 64 rows in other formats."""
    distinct = len(problem.rows)
    assert rows % distinct == 0
    tokens = rows * problem.tokens.shape[1]
    with tempfile.TemporaryDirectory() as scratch:
        directory = pathlib.Path(scratch)
        formats.Ours(problem, rows).write(directory / "store", [])
        total = directory_bytes(directory / "store")
        store = teachers.open_store(directory / "store")
        parts = dict.fromkeys(store.part_bytes(0), 0.0)
        for row in range(distinct):
            for name, size in store.part_bytes(row).items():
                parts[name] += size / problem.tokens.size
        files = {
            path.name: path.stat().st_size / tokens
            for path in (directory / "store").iterdir()
            if "array_record" not in path.name
        }
        records = sum(parts.values())
        parts["a row's key, TFDS, ArrayRecord"] = total / tokens - records - sum(files.values())
        others = {}
        for peer in peers:
            place = directory / type(peer).__name__
            place.mkdir()
            # Enough rows that an ArrayRecord's last blocks of 64 KiB do not count.
            some = [problem.scheme.unpack(problem.rows[i % distinct]) for i in range(64)]
            peer.write(place, some)
            others[peer.name] = directory_bytes(place) / (64 * problem.tokens.shape[1])
    return {
        "bytes_per_token": total / tokens,
        "bytes_per_id": total / tokens / problem.mean_ids,
        "mean_ids": problem.mean_ids,
        "tau": problem.scheme.tau,
        "tokens": tokens,
        "parts": parts | files,
        "others": others,
    }
