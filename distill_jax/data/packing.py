"""Rows of one length, and what each position of a row is to predict.

A row is `tokens` and `segment_ids`, int32 [T]. Segments count from 1 within a row, 0 is padding;
attention and labels never cross from one segment into another.
"""

import collections
import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

Ids = Sequence[int] | np.ndarray
Part = tuple[int, list[Ids]]
"""Some of a row: where in it they begin, and pieces of documents."""


def pack(
    documents: Iterable[Ids], sequence_length: int, *, pad_id: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Lays token sequences end to end into full rows; only the last row may end in padding.

    A document that does not fit goes on in the next row, as a new segment there. No token is
    dropped or repeated, so the segments of all rows, joined, are the documents joined.
    """
    for _, _, pieces in cut(documents, sequence_length):
        yield lay(pieces, sequence_length, pad_id=pad_id)


def cut(
    documents: Iterable[Ids], sequence_length: int, *, start: int = 0
) -> Iterator[tuple[int, int, list[Ids]]]:
    """Cuts token sequences, laid end to end, wherever a row ends.

    Args:
      documents: some that follow one another.
      sequence_length: of a row.
      start: how many tokens lie before them: whoever packs a part of the documents alone needs to
        know no more of the others.

    Yields:
      (row, offset, pieces): the row's number, where in it the first piece begins, and the pieces
      of documents, none empty. All but the first and the last fill their row.
    """
    row, offset = divmod(start, sequence_length)
    filled = offset
    pieces: list[Ids] = []
    for document in documents:
        begin = 0
        while begin < len(document):
            piece = document[begin : begin + sequence_length - filled]
            begin += len(piece)
            filled += len(piece)
            pieces.append(piece)
            if filled == sequence_length:
                yield row, offset, pieces
                row, offset, filled, pieces = row + 1, 0, 0, []
    if pieces:
        yield row, offset, pieces


def starts(counts: Iterable[tuple[tuple, int]]) -> dict[tuple, int]:
    """How many tokens lie before each part of the documents, from how many each has.

    Parts are named by tuples and follow one another in the order of these; names that differ in
    their first entry, such as a split's, are of documents that have nothing to do with each other.
    """
    ends: collections.Counter = collections.Counter()
    found = {}
    for name, tokens in sorted(counts):
        found[name] = ends[name[0]]
        ends[name[0]] += tokens
    return found


def join(parts: Iterable[Part]) -> list[Ids]:
    """The pieces of one row, of which several calls of `cut` gave parts."""
    in_order = sorted(parts, key=lambda part: part[0])
    return [piece for _, pieces in in_order for piece in pieces]


def lay(
    pieces: Sequence[Ids], sequence_length: int, *, pad_id: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """One row, `tokens` and `segment_ids`, of all its pieces; padding fills what they leave."""
    tokens = np.full(sequence_length, pad_id, np.int32)
    segment_ids = np.zeros(sequence_length, np.int32)
    end = 0
    for segment, piece in enumerate(pieces, start=1):
        begin, end = end, end + len(piece)
        tokens[begin:end] = piece
        segment_ids[begin:end] = segment
    return tokens, segment_ids


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
