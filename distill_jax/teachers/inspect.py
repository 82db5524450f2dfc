"""A look into a store for a person: what it is, what a token costs, how many ids it has."""

import collections
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import rich.console
import rich.table

from distill_jax import artifacts, data
from distill_jax.artifacts import InputError
from distill_jax.teachers.rows import Corpus
from distill_jax.teachers.store import open_store

_BARS, _BAR_WIDTH = 16, 40
"""At most so many bars of a histogram, and characters of the longest."""


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


def describe_row(
    directory: str | os.PathLike[str],
    corpus: Corpus,
    tokenizer: data.Tokenizer,
    row: int = 0,
    *,
    tokens: int = 32,
    runners_up: int = 4,
) -> dict[str, Any]:
    """The text of a row, and what the teacher thought would come after each of its tokens.

    Args:
      directory: the store.
      corpus: any corpus with this row; it is found in the store by its content.
      tokenizer: the corpus's.
      row: its number in the corpus.
      tokens: how many of its first tokens to show.
      runners_up: how many of a token's stored ids, likeliest first.

    Returns:
      row_id, key, and for each token its text as "token"; "next", the text that really follows
      and "next_probability", the teacher's for it (both None where nothing does); the teacher's
      "entropy" in nats; and "likeliest", pairs of text and stored probability. A sampled id's
      probability is its weight, right on average only.

    Raises:
      InputError: another tokenizer made the store, or it or the corpus has no such row.
    """
    store = open_store(directory)
    for what, found in (("corpus", corpus.tokenizer_fingerprint), ("given", tokenizer.fingerprint)):
        if found != store.identity.tokenizer:
            raise InputError(
                f"{store.directory} has tokenizer {store.identity.tokenizer}, the {what} one is "
                f"{found}"
            )
    if not 0 <= row < len(corpus):
        raise InputError(f"row {row}: the corpus has rows 0 to {len(corpus) - 1}")
    record = corpus[row]
    (place,) = store.positions([record["key"]]).tolist()
    if place < 0:
        raise InputError(f"{store.directory}: has no row of content {record['key']} (row {row})")
    stored = store[place]["targets"]
    probabilities_TK = store.scheme.probabilities(stored)
    following_T, where_T = data.next_token_labels(record["tokens"], record["segment_ids"])
    text = lambda id_: tokenizer.decode([int(id_)])  # noqa: E731
    shown = []
    for position in range(min(tokens, int(np.count_nonzero(record["segment_ids"])))):
        order = np.argsort(-probabilities_TK[position], kind="stable")[:runners_up]
        likeliest = [
            (text(stored["ids"][position, k]), float(probabilities_TK[position, k]))
            for k in order.tolist()
            if probabilities_TK[position, k] > 0
        ]
        known = bool(where_T[position])
        surprise = float(stored["label_log_prob"][position])
        shown.append(
            {
                "token": text(record["tokens"][position]),
                "next": text(following_T[position]) if known else None,
                "next_probability": float(np.exp(surprise)) if known else None,
                "entropy": float(stored["entropy"][position]),
                "likeliest": likeliest,
            }
        )
    return {"row_id": int(record["row_id"]), "key": record["key"], "tokens": shown}


def show(found: Mapping[str, Any], console: rich.console.Console | None = None) -> None:
    """Prints what `describe` returns, and under "row" what `describe_row` does, for a person."""
    # Texts of a corpus are data: what looks like markup in them is none.
    console = console or rich.console.Console(markup=False, highlight=False, emoji=False)
    about = {
        **found["identity"],
        "scheme": ", ".join(
            f"{name} {value}" if name != "name" else str(value)
            for name, value in sorted(found["identity"]["scheme"].items(), key=_name_first)
            if value is not None
        ),
        "tokens": f"{found['tokens']:,}",
        "bytes": f"{found['bytes']:,}",
        "mean ids per token": f"{found['mean_ids']:.2f}",
        "teacher's entropy": f"{found['mean_entropy']:.3f} nats",
    }
    if found["teacher_cross_entropy"] is not None:
        about["teacher's cross-entropy"] = f"{found['teacher_cross_entropy']:.3f} nats"
    console.print(_table(("", ""), [(name, str(value)) for name, value in about.items()]))
    sizes = [(name, f"{size:.3f}") for name, size in found["bytes_per_token"].items()]
    console.print(_table(("part", "bytes per token"), sizes))
    console.print(_table(("ids", "tokens", ""), _bars(found["ids_per_token"])))
    if "row" in found:
        row = found["row"]
        console.print(f"row {row['row_id']}, key {row['key']}")
        console.print(_table(_ROW_COLUMNS, [_row_line(one) for one in row["tokens"]]))


_ROW_COLUMNS = ("token", "next", "its p", "entropy", "likeliest, as stored")


def _name_first(item: tuple[str, Any]) -> tuple[bool, str]:
    return item[0] != "name", item[0]


def _row_line(one: Mapping[str, Any]) -> tuple[str, ...]:
    # `repr` shows where a text begins and ends, and escapes what a terminal would obey.
    likeliest = "  ".join(f"{text!r} {share:.1%}" for text, share in one["likeliest"])
    known = one["next"] is not None
    following = (repr(one["next"]), f"{one['next_probability']:.1%}") if known else ("", "")
    return (repr(one["token"]), *following, f"{one['entropy']:.2f}", likeliest)


def _bars(ids_per_token: Mapping[int, float]) -> list[tuple[str, str, str]]:
    """A histogram: ids from and to, share of tokens, and a bar; at most `_BARS` of them."""
    counts = range(min(ids_per_token, default=0), max(ids_per_token, default=0) + 1)
    wide = -(-len(counts) // _BARS)
    bins = [counts[start : start + wide] for start in range(0, len(counts), wide)]
    shares = [sum(ids_per_token.get(count, 0.0) for count in some) for some in bins]
    longest = max(shares) or 1.0
    return [
        (
            f"{some[0]}" if len(some) == 1 else f"{some[0]} to {some[-1]}",
            f"{share:.1%}",
            "█" * round(_BAR_WIDTH * share / longest),
        )
        for some, share in zip(bins, shares)
    ]


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> rich.table.Table:
    made = rich.table.Table(box=None, show_header=any(columns), padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column, overflow="fold")
    for line in lines:
        made.add_row(*line)
    return made
