"""Checks a store: every byte against its hash, and a sample of rows against the teacher."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from distill_jax import artifacts, models, progress
from distill_jax.artifacts import InputError
from distill_jax.teachers import sampling
from distill_jax.teachers.forward import ask_teacher, labels
from distill_jax.teachers.manifest import read_manifest, teacher_fingerprint
from distill_jax.teachers.rows import Corpus
from distill_jax.teachers.store import Store, open_store
from distill_jax.teachers.writer import WriteConfig, encode_row


def verify(
    directory: str | os.PathLike[str],
    corpus: Corpus | None = None,
    model: models.Model | None = None,
    *,
    sample: int = 16,
    seed: int = 0,
    tolerance: float = 0.02,
) -> dict[str, Any]:
    """Re-hashes every file, decodes every record, and asks the teacher again about a sample.

    Args:
      directory: the store.
      corpus: the corpus it was written for, whose rows are all compared by key; None leaves it and
        the teacher out.
      model: the teacher; None leaves it out.
      sample: rows that are computed again.
      seed: draws them.
      tolerance: the largest mean total variation, over the sampled tokens, between what is
        stored and what the teacher says now. Other hardware rounds otherwise, so it is not 0.

    Returns:
      figures: rows, tokens, and of the sample its rows, the share of tokens that came out the
      same and the mean total variation.

    Raises:
      InputError: anything is not as it was written, or is not the teacher's.
    """
    if model is not None and corpus is None:
        raise InputError("verify: the teacher can be asked again only with the corpus at hand")
    if sample < 1:
        raise InputError(f"sample: {sample} is not a positive number of rows")
    _check_hashes(artifacts.resolve(directory))
    store = open_store(directory)
    figures = _check_records(store)
    if corpus is None:
        return figures
    if corpus.fingerprint != store.identity.corpus:
        raise InputError(
            f"{store.directory}: written for corpus {store.identity.corpus}, "
            f"not for {corpus.fingerprint}"
        )
    _check_rows(store, corpus)
    if model is None:
        return figures
    fingerprint = teacher_fingerprint(model)
    if fingerprint != store.identity.teacher:
        raise InputError(
            f"{store.directory}: written by teacher {store.identity.teacher}, not by {fingerprint}"
        )
    rows = np.random.default_rng(seed).permutation(len(store))[:sample]
    return figures | _check_sample(store, corpus, model, sorted(rows.tolist()), tolerance)


def total_variation(
    ids: np.ndarray, weights: np.ndarray, other_ids: np.ndarray, other_weights: np.ndarray
) -> np.ndarray:
    """Half the L1 distance, [T], between two sparse distributions of every token, [T, K] each."""
    tokens = len(ids)
    both = np.concatenate((ids, other_ids), axis=1).astype(np.int64)
    signed = np.concatenate((weights, -other_weights), axis=1)
    place = np.arange(tokens)[:, None] * (int(both.max()) + 1) + both
    places, inverse = np.unique(place.ravel(), return_inverse=True)
    difference = np.abs(np.bincount(inverse.ravel(), signed.ravel()))
    token = places // (int(both.max()) + 1)
    return np.bincount(token, difference, minlength=tokens) / 2


def _check_hashes(directory: epath.Path) -> None:
    files = read_manifest(directory).files
    with progress.bar("verify files", len(files), unit="files") as bar:
        for name, written in files.items():
            path = directory / name
            if not path.exists():
                raise InputError(f"{path}: missing from the store")
            found = artifacts.hash_file(path)
            if found != written:
                raise InputError(f"{path}: its hash is {found}, it was written as {written}")
            bar.advance()


def _check_records(store: Store) -> dict[str, Any]:
    tokens = 0
    with progress.bar("verify records", len(store), unit="rows") as bar:
        for position in range(len(store)):
            _, _, columns = store.read_columns(position)
            count = int(np.count_nonzero(columns["length"]))
            tokens += count
            bar.advance(1, tokens=count)
    if tokens != store.manifest.tokens:
        raise InputError(
            f"{store.directory}: has {tokens} tokens, its manifest says {store.manifest.tokens}"
        )
    return {"rows": len(store), "tokens": tokens}


def _check_rows(store: Store, corpus: Corpus) -> None:
    if len(corpus) != len(store):
        raise InputError(f"{store.directory}: has {len(store)} rows, the corpus {len(corpus)}")
    with progress.bar("verify corpus", len(store), unit="rows") as bar:
        for row in range(len(store)):
            key = corpus[row]["key"]
            if key != store.key(row):
                raise InputError(
                    f"{store.directory}: row {row} is {store.key(row)}, the corpus's is {key}"
                )
            bar.advance()


def _check_sample(
    store: Store, corpus: Corpus, model: models.Model, rows: list[int], tolerance: float
) -> dict[str, Any]:
    distances = []
    with progress.bar("verify teacher", len(rows), unit="rows") as bar:
        for row in rows:
            record, stored = corpus[row], store[row]
            again = _ask(model, store, record)
            real_T = np.asarray(record["segment_ids"]) > 0
            distance_T = _distance(store, stored["targets"], again)[real_T]
            distances.append(distance_T)
            bar.advance(1, tokens=distance_T.size)
    every = np.concatenate(distances)
    figures = {
        "sampled_rows": len(rows),
        "same_tokens": float(np.mean(every == 0)),
        "total_variation": float(every.mean()),
    }
    if not figures["total_variation"] <= tolerance:
        raise InputError(
            f"{store.directory}: the teacher says otherwise now, total variation "
            f"{figures['total_variation']:.3g} over {len(rows)} rows (at most {tolerance})"
        )
    return figures


def _ask(model: models.Model, store: Store, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the teacher says about one row now, as it would come back from a store."""
    identity, key = store.identity, record["key"]
    seeds = sampling.row_seeds([key], salt=identity.teacher)
    tokens, segment_ids = (np.asarray(record[name]) for name in ("tokens", "segment_ids"))
    (encoded,) = ask_teacher(
        model.params,
        tokens[None],
        segment_ids[None],
        labels(tokens, segment_ids)[None],
        seeds,
        config=model.config,
        schemes=(identity.scheme,),
        temperature=identity.temperature,
        chunk_tokens=WriteConfig().chunk_tokens,
    )
    row = {name: np.asarray(values[0]) for name, values in encoded.items()}
    data = encode_row(store.codec, row, segment_ids, row_id=record["row_id"], key=key).data
    decoded = store.codec.decode(data, key, identity.scheme.width)
    return identity.scheme.unpack(decoded)


def _distance(
    store: Store, stored: Mapping[str, np.ndarray], again: Mapping[str, np.ndarray]
) -> np.ndarray:
    probabilities = store.scheme.probabilities
    return total_variation(stored["ids"], probabilities(stored), again["ids"], probabilities(again))
