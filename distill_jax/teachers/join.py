"""Rows of a corpus with what teachers said about them, found by content."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from distill_jax import progress
from distill_jax.artifacts import InputError
from distill_jax.teachers.rows import Corpus
from distill_jax.teachers.store import Store

_COMPARED = 64


class JoinedSource:
    """A corpus's rows with "targets": {teacher: arrays}; random access, made by `join`."""

    def __init__(self, corpus: Corpus, stores: Mapping[str, Store], places: Mapping[str, Any]):
        self._corpus, self._stores, self._places = corpus, dict(stores), dict(places)

    def __len__(self) -> int:
        return len(self._corpus)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The corpus's record and every teacher's arrays, [T] or [T, width of the store].

        Raises:
          InputError: a stored record is damaged, or belongs to another row.
        """
        record = self._corpus[index]
        targets = {}
        for name, store in self._stores.items():
            stored = store[int(self._places[name][index])]
            _check_key(store, stored["key"], record, index)
            targets[name] = stored["targets"]
        return {**record, "targets": targets}


def join(
    corpus: Corpus,
    stores: Mapping[str, Store],
    *,
    vocab_size: int | None = None,
    temperature: float | Mapping[str, float] | None = None,
) -> JoinedSource:
    """Joins a corpus with stored targets by the content of its rows.

    A store of another corpus will do if it has every row of this one. Everything that could
    be wrong is found here, before the first step of training; only of a corpus whose fingerprint
    is that of the store, as `data.Corpus` makes it of all rows, no more than 64 rows are compared
    here, and each of the others when it is read.

    Args:
      corpus: the rows to train on, in their order.
      stores: a store for every teacher's name.
      vocab_size: the student's vocabulary, if it is to be compared.
      temperature: the temperature that the losses ask for, one or for every teacher's name.

    Returns:
      A random-access source of the corpus's records, each with "targets": {name: arrays};
      `to_targets` makes what the losses take of a batch of those arrays. The arrays at
      position t are about the token at t + 1, as the corpus's labels are.

    Raises:
      InputError: a store has another tokenizer, vocabulary, sequence length or temperature, or
        other rows.
    """
    if isinstance(temperature, Mapping):
        for name in temperature.keys() - stores.keys():
            raise InputError(f"temperature: {name!r} is no teacher; there are {sorted(stores)}")
    for name, store in stores.items():
        wanted = temperature.get(name) if isinstance(temperature, Mapping) else temperature
        _check(corpus, name, store, vocab_size, wanted)
    _check_same_vocabulary(stores)
    return JoinedSource(corpus, stores, _find_rows(corpus, stores))


def _check(
    corpus: Corpus, name: str, store: Store, vocab_size: int | None, temperature: float | None
) -> None:
    identity = store.identity
    sides = (
        ("tokenizer", identity.tokenizer, "the corpus", corpus.tokenizer_fingerprint),
        ("sequence length", identity.sequence_length, "the corpus", corpus.sequence_length),
        ("vocabulary", identity.vocab_size, "the student", vocab_size),
        ("temperature", identity.temperature, "the loss", temperature),
    )
    for what, stored, other, wanted in sides:
        if wanted is not None and stored != wanted:
            raise InputError(
                f"teacher {name}: {store.directory} has {what} {stored}, {other} has {wanted}"
            )


def _check_same_vocabulary(stores: Mapping[str, Store]) -> None:
    sizes = {name: store.identity.vocab_size for name, store in stores.items()}
    if len(set(sizes.values())) > 1:
        sides = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise InputError(f"teachers have vocabularies of different size: {sides}")


def _find_rows(corpus: Corpus, stores: Mapping[str, Store]) -> dict[str, Any]:
    """The place of every corpus row in each store."""
    same: range = range(len(corpus))
    places: dict[str, Any] = dict.fromkeys(stores, same)
    others = {
        name: store for name, store in stores.items() if store.identity.corpus != corpus.fingerprint
    }
    for name, store in stores.items():
        if name not in others:
            _check_rows(corpus, name, store)
    if not others:
        return places
    keys = []
    with progress.bar("join", len(corpus), unit="rows") as bar:
        for index in same:
            keys.append(corpus[index]["key"])
            bar.advance()
    for name, store in others.items():
        places[name] = store.positions(keys)
        missing = np.flatnonzero(places[name] < 0)
        if missing.size:
            raise InputError(
                f"teacher {name}: {store.directory} (written for corpus {store.identity.corpus}) "
                f"lacks {missing.size} of {len(corpus)} rows of corpus {corpus.fingerprint}, "
                f"the first row {missing[0]} (key {keys[missing[0]]})"
            )
    return places


def _check_rows(corpus: Corpus, name: str, store: Store) -> None:
    """Compares a corpus with a store that was written for it, by some of the rows."""
    if len(store) != len(corpus):
        raise InputError(
            f"teacher {name}: {store.directory} has {len(store)} rows of corpus "
            f"{store.identity.corpus}, the corpus has {len(corpus)}"
        )
    for row in np.unique(np.linspace(0, len(corpus) - 1, _COMPARED).astype(int)).tolist():
        _check_key(store, store.key(row), corpus[row], row)


def _check_key(store: Store, key: str, record: Mapping[str, Any], row: int) -> None:
    if key != record["key"]:
        raise InputError(
            f"{store.directory}: has row {key} where the corpus has {record['key']} (row {row})"
        )
