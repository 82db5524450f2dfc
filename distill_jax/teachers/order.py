"""The order in which a store numbers ids: the corpus's frequent ones first, where they cost less.

What is kept in the store are the counts of a sample of the corpus's rows, so that the order is a
function of the corpus. A teacher's runners-up are not the corpus's tokens, yet alike enough.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from distill_jax.artifacts import InputError
from distill_jax.teachers import bits

_SAMPLED_TOKENS = 1 << 24


def sampled_rows(rows: int, sequence_length: int) -> np.ndarray:
    """The rows to count, spread evenly: all, or enough for 17 million tokens."""
    few = max(1, _SAMPLED_TOKENS // sequence_length)
    return np.arange(rows) if rows <= few else np.linspace(0, rows - 1, few).astype(np.int64)


def count_tokens(records: Iterable[Mapping[str, Any]], vocab_size: int) -> np.ndarray:
    """How often each id occurs outside padding, int64 [V]."""
    counts = np.zeros(vocab_size, np.int64)
    for record in records:
        tokens = np.asarray(record["tokens"])[np.asarray(record["segment_ids"]) > 0]
        counts += np.bincount(tokens, minlength=vocab_size)
    return counts


def by_frequency(counts: np.ndarray) -> np.ndarray:
    """The ids from the most frequent to the rarest, equals by rising id, int32 [V]."""
    return np.argsort(-counts, kind="stable").astype(np.int32)


def counts_to_bytes(counts: np.ndarray) -> bytes:
    """All counts, as `bits` packs numbers."""
    return bits.pack([counts])[0]


def counts_from_bytes(data: bytes, vocab_size: int) -> np.ndarray:
    """What `counts_to_bytes` was given.

    Raises:
      InputError: these are not so many counts.
    """
    try:
        counts = bits.unpack(data, at_most=vocab_size)
    except bits.Unreadable as error:
        raise InputError(f"not the counts of a vocabulary ({error})") from error
    if len(counts) != vocab_size:
        raise InputError(f"has counts of {len(counts)} ids, the vocabulary {vocab_size}")
    return counts
