"""Runs a teacher over a corpus once and writes what it says into one store or several."""

import collections
import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding

from distill_jax import models, progress
from distill_jax.artifacts import InputError
from distill_jax.teachers import order, sampling
from distill_jax.teachers.codec import Codec
from distill_jax.teachers.forward import HiddenStates, ask_teacher, labels
from distill_jax.teachers.manifest import Identity, Manifest, teacher_fingerprint
from distill_jax.teachers.schemes import Scheme
from distill_jax.teachers.shards import Record, StoreWriter

# Batches whose results may wait for the disk: one being written, one behind it.
_IN_FLIGHT = 2


class Corpus(Protocol):
    """What is read from a corpus; `data.Corpus` is one.

    A row is {"row_id": int, "key": str, "tokens": int [T], "segment_ids": int [T], 0 for padding}.
    """

    fingerprint: str
    tokenizer_fingerprint: str
    sequence_length: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteConfig:
    """How the teacher is run; decides nothing about what it says.

    Only `rows_per_shard` shows in a store. The samples depend on a row's content and on the
    teacher's logits alone, yet compilers may round the logits of another batch shape otherwise.

    Attributes:
      batch_rows: rows in one forward pass.
      rows_per_shard: rows in one shard, the unit of restart.
      chunk_tokens: tokens whose logits exist at a time.
    """

    batch_rows: int = 8
    rows_per_shard: int = 1024
    chunk_tokens: int = 512

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise InputError(f"WriteConfig.{field.name}: must be at least 1")


def write_stores(
    directories: Mapping[str, str | os.PathLike[str]],
    schemes: Mapping[str, Scheme],
    model: models.Model,
    corpus: Corpus,
    *,
    temperature: float = 1.0,
    config: WriteConfig | None = None,
    sharding: NamedSharding | None = None,
    hidden_states: HiddenStates = models.hidden_states,
) -> dict[str, Any]:
    """Writes one store for every scheme, from one forward pass over the corpus.

    May be called again after an earlier call was killed: it goes on at the first shard that
    is missing and ends with the same bytes.

    Args:
      directories: where each scheme's store goes.
      schemes: what each store keeps, under the same names.
      model: the teacher.
      corpus: the rows.
      temperature: what the teacher's logits are divided by.
      config: how the teacher is run.
      sharding: where a batch's rows go; None leaves that to JAX. Over a mesh axis "tensor" beside
        them the vocabulary is split, and logits are never gathered.
      hidden_states: the forward pass, `models.hidden_states` or one of its signature.

    Returns:
      for every name its store's figures: rows, tokens, width, bytes, bytes_per_token.

    Raises:
      InputError: a directory holds other targets, a token is outside the vocabulary, or the
        teacher's logits are not finite.
    """
    config = config or WriteConfig()
    if directories.keys() != schemes.keys():
        raise InputError(f"directories: {sorted(directories)} are not schemes {sorted(schemes)}")
    if not temperature > 0:
        raise InputError(f"temperature: {temperature} is not positive")
    if not len(corpus):
        raise InputError(f"corpus {corpus.fingerprint}: has no rows")
    identities = _identities(schemes, model, corpus, temperature, config)
    counts = _count_tokens(corpus, next(iter(identities.values())))
    writers = {
        name: StoreWriter(directories[name], identity, counts)
        for name, identity in identities.items()
    }
    forward = functools.partial(
        ask_teacher,
        model.params,
        config=model.config,
        schemes=tuple(schemes.values()),
        temperature=float(temperature),
        chunk_tokens=config.chunk_tokens,
        hidden_states=hidden_states,
        sharding=sharding,
    )
    _write_missing(list(writers.values()), forward, corpus, config, sharding)
    return {name: _figures(w.finish(), w.directory) for name, w in writers.items()}


def _identities(
    schemes: Mapping[str, Scheme],
    model: models.Model,
    corpus: Corpus,
    temperature: float,
    config: WriteConfig,
) -> dict[str, Identity]:
    for scheme in schemes.values():
        scheme.columns(model.config.vocab_size)
    teacher = teacher_fingerprint(model)
    return {
        name: Identity(
            teacher=teacher,
            tokenizer=corpus.tokenizer_fingerprint,
            corpus=corpus.fingerprint,
            rows=len(corpus),
            rows_per_shard=config.rows_per_shard,
            sequence_length=corpus.sequence_length,
            vocab_size=model.config.vocab_size,
            temperature=float(temperature),
            scheme=scheme,
        )
        for name, scheme in schemes.items()
    }


def _count_tokens(corpus: Corpus, identity: Identity) -> np.ndarray:
    """How often each id occurs in the corpus, or in rows spread over a large one."""

    def records() -> Iterator[Mapping[str, Any]]:
        rows = order.sampled_rows(len(corpus), corpus.sequence_length)
        with progress.bar("count tokens", len(rows), unit="rows") as bar:
            for row in rows.tolist():
                record = corpus[row]
                _check_row(record, row, identity)
                bar.advance()
                yield record

    return order.count_tokens(records(), identity.vocab_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Batch:
    """Rows of one shard, filled up with empty rows to the batch size that was compiled."""

    shard: int
    row_ids: list[int]
    keys: list[str]
    tokens_BT: np.ndarray
    segment_ids_BT: np.ndarray
    last: bool

    @property
    def inputs(self) -> tuple[np.ndarray, ...]:
        """Tokens, segments and labels, [B, T]."""
        labels_BT = labels(self.tokens_BT, self.segment_ids_BT)
        return self.tokens_BT, self.segment_ids_BT, labels_BT


def _write_missing(
    writers: list[StoreWriter],
    forward: Callable[..., tuple[dict[str, jax.Array], ...]],
    corpus: Corpus,
    config: WriteConfig,
    sharding: NamedSharding | None,
) -> None:
    """Encodes and writes in the background while the next batch is computed."""
    identity = writers[0].identity
    pending = [_PendingShard(writer) for writer in writers]
    shards = sorted(set().union(*(shard.missing for shard in pending)))

    def store(batch: _Batch, encoded: tuple[dict[str, jax.Array], ...]) -> None:
        for shard, arrays in zip(pending, encoded):
            if batch.shard in shard.missing:
                shard.add(batch, jax.device_get(arrays))

    rows = sum(len(identity.shard_rows(shard)) for shard in shards)
    with (
        progress.bar("targets", len(corpus), unit="rows", done=len(corpus) - rows) as bar,
        _background() as submit,
    ):
        for batch in _batches(corpus, identity, shards, config.batch_rows):
            seeds = sampling.row_seeds(batch.keys, salt=identity.teacher)
            seeds = np.pad(seeds, ((0, len(batch.tokens_BT) - len(seeds)), (0, 0)))
            inputs = jax.device_put((*batch.inputs, seeds), sharding)
            submit(store, batch, forward(*inputs))
            bar.advance(len(batch.keys), tokens=int((batch.segment_ids_BT > 0).sum()))


def _batches(
    corpus: Corpus, identity: Identity, shards: list[int], batch_rows: int
) -> Iterator[_Batch]:
    """Batches of the given shards' rows in order; none spans two shards."""
    for shard in shards:
        rows = identity.shard_rows(shard)
        for start in range(0, len(rows), batch_rows):
            some = rows[start : start + batch_rows]
            records = [corpus[row] for row in some]
            tokens = np.zeros((batch_rows, identity.sequence_length), np.int32)
            segment_ids = np.zeros_like(tokens)
            for place, (row, record) in enumerate(zip(some, records)):
                _check_row(record, row, identity)
                tokens[place], segment_ids[place] = record["tokens"], record["segment_ids"]
            yield _Batch(
                shard=shard,
                row_ids=[int(record["row_id"]) for record in records],
                keys=[record["key"] for record in records],
                tokens_BT=tokens,
                segment_ids_BT=segment_ids,
                last=some.stop == rows.stop,
            )


class _PendingShard:
    """The records of the shard of one store that is being filled.

    Attributes:
      missing: the shards that the store lacks.
    """

    def __init__(self, writer: StoreWriter):
        self.missing = frozenset(writer.missing())
        self._writer = writer
        self._records: list[Record] = []

    def add(self, batch: _Batch, encoded: Mapping[str, np.ndarray]) -> None:
        """Encodes a batch's rows, and commits the shard if they are its last."""
        for place, (row_id, key) in enumerate(zip(batch.row_ids, batch.keys)):
            arrays = {name: values[place] for name, values in encoded.items()}
            record = encode_row(
                self._writer.codec, arrays, batch.segment_ids_BT[place], row_id=row_id, key=key
            )
            self._records.append(record)
        if batch.last:
            self._writer.commit(batch.shard, self._records)
            self._records = []


def encode_row(
    codec: Codec,
    arrays: Mapping[str, np.ndarray],
    segment_ids_T: np.ndarray,
    *,
    row_id: int,
    key: str,
) -> Record:
    """The record of one row, from what the scheme's `encode` returned for its tokens.

    Nothing is kept of padding: length, and every other value per token, is 0 there.

    Raises:
      InputError: the teacher's logits were not finite.
    """
    real_T = segment_ids_T > 0
    if not np.isfinite(arrays["entropy"][real_T]).all():
        raise InputError(f"teacher {codec.teacher}: its logits for row {row_id} are not finite")
    arrays = {
        name: np.where(real_T, values, 0) if values.ndim == 1 else values
        for name, values in arrays.items()
    }
    return Record(
        row_id=row_id,
        key=key,
        data=codec.encode(arrays, key),
        tokens=int(real_T.sum()),
        labels=int(np.count_nonzero(arrays["label_log_prob"])),
        width=int(arrays["length"].max()),
    )


@contextlib.contextmanager
def _background() -> Iterator[Callable[..., None]]:
    """A function that runs calls one after another in a thread, a few at most waiting.

    A failed call fails the next one submitted, or the end of the block.
    """
    waiting: collections.deque[futures.Future[None]] = collections.deque()
    with futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="targets") as pool:

        def submit(function: Callable[..., None], *args: Any) -> None:
            if len(waiting) == _IN_FLIGHT:
                waiting.popleft().result()
            waiting.append(pool.submit(function, *args))

        try:
            yield submit
            while waiting:
                waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _check_row(record: Mapping[str, Any], row: int, identity: Identity) -> None:
    tokens = np.asarray(record["tokens"])
    if tokens.shape != (identity.sequence_length,):
        raise InputError(
            f"corpus {identity.corpus}: row {row} has shape {tokens.shape}, "
            f"not ({identity.sequence_length},)"
        )
    if tokens.min() < 0 or tokens.max() >= identity.vocab_size:
        raise InputError(
            f"corpus {identity.corpus}: row {row} has token {tokens.max()}, "
            f"the teacher's vocabulary ends at {identity.vocab_size - 1}"
        )


def _figures(manifest: Manifest, directory: pathlib.Path) -> dict[str, Any]:
    size = sum((directory / name).stat().st_size for name in manifest.files)
    return {
        "rows": manifest.identity.rows,
        "tokens": manifest.tokens,
        "width": manifest.width,
        "bytes": size,
        "bytes_per_token": size / max(manifest.tokens, 1),
    }
