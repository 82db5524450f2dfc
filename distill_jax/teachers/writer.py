"""Runs a teacher over a corpus once and writes what it says into one store or several.

With several processes each is dealt shards of its own. A batch holds rows of every process's
current shard; its targets come back to the process that fed the row, which encodes and writes
them, so that nothing travels between processes but what the model needs.
"""

import collections
import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from distill_jax import artifacts, models, parallel, progress
from distill_jax.artifacts import InputError
from distill_jax.teachers import order
from distill_jax.teachers.codec import Codec
from distill_jax.teachers.forward import HiddenStates, ask_teacher, times_of
from distill_jax.teachers.manifest import Identity, teacher_fingerprint
from distill_jax.teachers.reuse import Reuse
from distill_jax.teachers.rows import Batch, Corpus, batches, check_row, inputs
from distill_jax.teachers.schemes import Scheme
from distill_jax.teachers.shards import Record, StoreWriter, read_keys

# Batches whose results may wait for the disk: one being written, one behind it.
_IN_FLIGHT = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteConfig:
    """How the teacher is run; decides nothing about what it says.

    Only `rows_per_shard` shows in a store. The samples depend on a row's content and on the
    teacher's logits alone, yet compilers may round the logits of another batch shape otherwise.

    Attributes:
      batch_rows: rows in one forward pass of all devices.
      rows_per_shard: rows in one shard, the unit of restart.
      chunk_tokens: tokens whose logits exist at a time, on each device.
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
    reuse: Mapping[str, Sequence[str | os.PathLike[str]]] | None = None,
) -> dict[str, Any]:
    """Writes one store for every scheme, from one forward pass over the corpus.

    May be called again after an earlier call was killed, by as many processes or others: it goes
    on with the shards that are missing and ends with the same bytes. Several processes call it
    together, with the same arguments and directories that all of them see. Other processes write
    the same bytes as long as XLA rounds logits alike, which needs as many rows on each device; the
    axis "tensor" splits sums of the teacher, and rounds otherwise than one device, as do parts of
    a row.

    Args:
      directories: where each scheme's store goes.
      schemes: what each store keeps, under the same names.
      model: the teacher.
      corpus: the rows.
      temperature: what the teacher's logits are divided by.
      config: how the teacher is run.
      sharding: where a batch's rows go; None leaves that to JAX. Over a mesh axis "tensor" beside
        them the vocabulary is split, and logits are never gathered. If it does not split rows over
        a mesh axis "sequence", devices along that share them, each with a part of their times
        (with another `hidden_states` all of them read whole rows).
      hidden_states: the forward pass, `models.hidden_states` or one of its signature.
      reuse: for any of the names, finished stores of the same teacher, tokenizer, scheme and
        temperature. Rows that they have are copied, found by content key, and the teacher is
        asked about the others alone; the bytes are those of a store that was written without.

    Returns:
      for every name its store's figures: rows, of these reused, tokens, width, bytes and
      bytes_per_token.

    Raises:
      InputError: a directory holds other targets, a token is outside the vocabulary, the
        teacher's logits are not finite, or a store to reuse is of other targets.
      ProcessError: another process failed.
      Preempted: the job was told to stop (`parallel.stoppable`).
    """
    config = config or WriteConfig()
    if directories.keys() != schemes.keys():
        raise InputError(f"directories: {sorted(directories)} are not schemes {sorted(schemes)}")
    if not schemes:
        raise InputError("schemes: there are none")
    unknown = sorted((reuse or {}).keys() - schemes.keys())
    if unknown:
        raise InputError(f"reuse: {unknown} are not schemes {sorted(schemes)}")
    if not 0 < temperature < float("inf"):
        raise InputError(f"temperature: {temperature} is not positive and finite")
    if not len(corpus):
        raise InputError(f"corpus {corpus.fingerprint}: has no rows")
    with parallel.together():
        share = parallel.row_share(sharding)
        _check_batch(config, share)
        if hidden_states is models.hidden_states and (times := times_of(sharding)):
            times.check(corpus.sequence_length)
        identities = _identities(schemes, model, corpus, temperature, config)
        reused = {name: Reuse((reuse or {}).get(name, ()), i) for name, i in identities.items()}
        counts = _count_tokens(corpus, next(iter(identities.values())))
        writers = {
            name: StoreWriter(directories[name], identity, counts)
            for name, identity in identities.items()
        }
        missing = parallel.on_main(
            lambda: {name: writer.begin() for name, writer in writers.items()}, what="the start"
        )
        asking = asking_of(
            model.config, schemes, temperature, config, sharding, hidden_states=hidden_states
        )
        forward = functools.partial(asking, model.params)
        pending = [_PendingShard(writers[n], missing[n], reused[n]) for n in writers]
        _write_missing(pending, forward, corpus, config, share)
        parallel.barrier("the last shard")
        return parallel.on_main(
            lambda: {name: _figures(w, reused[name]) for name, w in writers.items()},
            what="the end of the stores",
        )


def asking_of(
    shape: models.LlamaConfig,
    schemes: Mapping[str, Scheme],
    temperature: float,
    config: WriteConfig,
    sharding: NamedSharding | None,
    *,
    hidden_states: HiddenStates = models.hidden_states,
) -> functools.partial:
    """`ask_teacher` as `write_stores` calls it, but for the parameters and the batch."""
    return functools.partial(
        ask_teacher,
        config=shape,
        schemes=tuple(schemes.values()),
        temperature=float(temperature),
        chunk_tokens=config.chunk_tokens,
        hidden_states=hidden_states,
        sharding=sharding,
    )


def _check_batch(config: WriteConfig, share: parallel.RowShare) -> None:
    parts = share.count * len(share.blocks)
    if config.batch_rows % parts:
        raise InputError(
            f"WriteConfig.batch_rows: {config.batch_rows} rows do not divide over the {parts} "
            f"parts into which the mesh splits rows"
        )


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
                check_row(record, row, identity)
                bar.advance()
                yield record

    return order.count_tokens(records(), identity.vocab_size)


def _write_missing(
    pending: Sequence["_PendingShard"],
    forward: Callable[..., tuple[dict[str, jax.Array], ...]],
    corpus: Corpus,
    config: WriteConfig,
    share: parallel.RowShare,
) -> None:
    """Encodes and writes in the background while the next batch is computed."""
    identity = pending[0].identity
    shards = sorted(set().union(*(shard.missing for shard in pending)))
    own = shards[share.index :: share.count]
    written_here = frozenset(own[share.member :: share.members])

    def is_known(shard: int, key: str) -> bool:
        return all(each.reuse.has(key) for each in pending if shard in each.missing)

    def store(batch: Batch, encoded: tuple[dict[str, jax.Array], ...]) -> None:
        for place, shard in enumerate(pending):
            if batch.shard in shard.missing:
                shard.add(batch, share.take(encoded[place]) if batch.asked else {})

    size = config.batch_rows // share.count
    work = batches(corpus, identity, own, size, is_known)
    rows = sum(len(identity.shard_rows(shard)) for shard in shards)
    with (
        progress.bar("targets", len(corpus), unit="rows", done=len(corpus) - rows) as bar,
        _background() as submit,
    ):
        while True:
            parallel.stop_if_preempted("while targets were written")
            batch = next(work, None)
            steps = parallel.gather(_step(batch, written_here), what="the next batch")
            steps = [step for step in steps if step is not None]
            if not steps:
                return
            encoded: tuple[dict[str, jax.Array], ...] = ()
            if any(step["ask"] for step in steps):
                encoded = forward(*share.put(inputs(batch, size, identity)))
            if batch is not None and batch.shard in written_here:
                submit(store, batch, encoded)
            bar.advance(sum(s["rows"] for s in steps), tokens=sum(s["tokens"] for s in steps))


def _step(batch: Batch | None, written_here: frozenset[int]) -> dict[str, int] | None:
    """What the other processes need to know of this one's batch; None: it has no more.

    Rows that several processes hold are counted by the one that writes them.
    """
    if batch is None:
        return None
    if batch.shard not in written_here:
        return {"ask": len(batch.asked), "rows": 0, "tokens": 0}
    rows = len(batch.asked) + len(batch.known)
    return {"ask": len(batch.asked), "rows": rows, "tokens": batch.tokens}


class _PendingShard:
    """The records of the shard of one store that is being filled.

    Attributes:
      identity: the store's.
      missing: the shards that the store lacks.
      reuse: the rows that need no teacher.
    """

    def __init__(self, writer: StoreWriter, missing: Sequence[int], reuse: Reuse):
        self.identity, self.missing, self.reuse = writer.identity, frozenset(missing), reuse
        self._writer = writer
        self._records: dict[int, Record] = {}

    def add(self, batch: Batch, encoded: Mapping[str, np.ndarray]) -> None:
        """Encodes a batch's rows, and commits the shard if they are its last."""
        codec = self._writer.codec
        for place, row in enumerate((*batch.asked, *batch.known)):
            record = batch.asked[row] if row in batch.asked else batch.known[row]
            made = self.reuse.record(record, codec)
            if made is None:
                arrays = {name: values[place] for name, values in encoded.items()}
                made = encode_row(
                    codec,
                    arrays,
                    np.asarray(record["segment_ids"]),
                    row_id=int(record["row_id"]),
                    key=record["key"],
                )
            self._records[row] = made
        if batch.last:
            records = [self._records[row] for row in sorted(self._records)]
            self._writer.commit(batch.shard, records)
            self._records = {}


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


def _figures(writer: StoreWriter, reuse: Reuse) -> dict[str, Any]:
    """Seals a store."""
    manifest = writer.finish()
    size = sum(artifacts.size(writer.directory / name) for name in manifest.files)
    return {
        "teacher": manifest.identity.teacher,
        "rows": manifest.identity.rows,
        "reused": reuse.count(read_keys(writer.directory)),
        "tokens": manifest.tokens,
        "width": manifest.width,
        "bytes": size,
        "bytes_per_token": size / max(manifest.tokens, 1),
    }
