"""A look into a store for a person: what it is, what a token costs, how many ids it has."""

import collections
import os
from typing import Any

import numpy as np

from distill_jax import artifacts
from distill_jax.teachers.store import open_store


def describe(directory: str | os.PathLike[str], *, sample: int = 64) -> dict[str, Any]:
    """Figures of a store, from its manifest and from rows spread evenly over it.

    Args:
      directory: the store.
      sample: how many rows are read.

    Returns:
      identity (what was stored, of whom), rows, tokens, width, bytes on disk, and of the sampled
      rows: bytes_per_token of every part of a record, ids_per_token as {number of ids: share of
      tokens}, mean_ids, and of the teacher, in nats at the store's temperature, mean_entropy and
      teacher_cross_entropy with the tokens that really came next (None where no token has a next
      one). "on_disk" among the bytes per token is of the whole directory.

    Raises:
      InputError: the store is not finished, or a sampled record is damaged.
    """
    store = open_store(directory)
    parts: Any = collections.Counter()
    ids: collections.Counter[int] = collections.Counter()
    entropy, surprise = 0.0, 0.0
    rows = np.unique(np.linspace(0, len(store) - 1, min(sample, len(store))).astype(int))
    for row in rows.tolist():
        _, _, columns = store.read_columns(row)
        parts.update(store.part_bytes(row))
        length = columns["length"]
        ids.update(length[length > 0].tolist())
        entropy += float(columns["entropy"][length > 0].sum())
        surprise -= float(columns["label_log_prob"].sum())
    tokens = max(ids.total(), 1)
    # A stored 0 may be a label that was nearly certain, so these are counted when written.
    labels = tokens * store.manifest.labels / max(store.manifest.tokens, 1)
    size = sum(artifacts.size(store.directory / name) for name in store.manifest.files)
    per_token = {name: count / tokens for name, count in parts.items()}
    return {
        "identity": store.identity.to_json(),
        "rows": len(store),
        "tokens": store.manifest.tokens,
        "width": store.manifest.width,
        "bytes": size,
        "bytes_per_token": per_token | {"on_disk": size / max(store.manifest.tokens, 1)},
        "ids_per_token": {count: share / tokens for count, share in sorted(ids.items())},
        "mean_ids": sum(count * share for count, share in ids.items()) / tokens,
        "mean_entropy": entropy / tokens,
        "teacher_cross_entropy": surprise / labels if labels else None,
    }
