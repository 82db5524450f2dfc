"""Rows of one length, and what each position of a row is to predict.

A row is `tokens` and `segment_ids`, int32 [T]. Segments count from 1 within a row, 0 is padding;
attention and labels never cross from one segment into another.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np


def pack(
    documents: Iterable[Sequence[int]], sequence_length: int, *, pad_id: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Lays token sequences end to end into full rows; only the last row may end in padding.

    A document that does not fit goes on in the next row, as a new segment there. No token is
    dropped or repeated, so the segments of all rows, joined, are the documents joined.
    """
    tokens: list[int] = []
    segment_ids: list[int] = []
    segment = 0
    for document in documents:
        start = 0
        while start < len(document):
            piece = document[start : start + sequence_length - len(tokens)]
            start += len(piece)
            segment += 1
            tokens.extend(piece)
            segment_ids.extend([segment] * len(piece))
            if len(tokens) == sequence_length:
                yield np.array(tokens, np.int32), np.array(segment_ids, np.int32)
                tokens, segment_ids, segment = [], [], 0
    if tokens:
        padding = sequence_length - len(tokens)
        yield (
            np.array(tokens + [pad_id] * padding, np.int32),
            np.array(segment_ids + [0] * padding, np.int32),
        )


def row_key(tokens: np.ndarray, segment_ids: np.ndarray) -> str:
    """32 hex digits that stand for a row's content; stored targets are joined to rows by it."""
    content = np.concatenate([tokens, segment_ids]).astype("<i4").tobytes()
    return hashlib.sha256(content).hexdigest()[:32]


def next_token_labels(tokens: np.ndarray, segment_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each position is to predict: the next token of its segment.

    Args:
      tokens: ids, int [..., T].
      segment_ids: int [..., T]; 0 is padding.

    Returns:
      `labels`, int32 [..., T], and `where`, bool [..., T]: False at a segment's last position and
      in padding, where `labels` is 0 and counts for nothing.
    """
    where = np.zeros(segment_ids.shape, bool)
    where[..., :-1] = (segment_ids[..., :-1] == segment_ids[..., 1:]) & (segment_ids[..., :-1] > 0)
    following = np.zeros(tokens.shape, np.int32)
    following[..., :-1] = tokens[..., 1:]
    return np.where(where, following, 0), where
