"""Teachers and students whose logits the schemes are measured on."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import problem

from distill_jax import data, models

DROPPED = (4, 9, 14, 19, 24)
"""Layers of SmolLM2 that the student lacks."""
ROW, BATCH = 256, 128
"""Tokens of a row of text; tokens at a time."""
_ROWS_AT_ONCE = 8


class Batch(NamedTuple):
    """Logits of teacher and student, [N, V], and the tokens that came next, -1 for none, [N]."""

    teacher_NV: jax.Array
    student_NV: jax.Array
    labels_N: np.ndarray


class Source(Protocol):
    """Where tokens come from.

    Attributes:
      token_counts: how often each id occurs in the text, [V].
    """

    token_counts: np.ndarray

    def batches(self, split: str, start: int, tokens: int) -> Iterator[Batch]:
        """Tokens of a split, "train" or "held_out", from one on; both are multiples of `ROW`."""
        ...


class Synthetic:
    """The synthetic teacher of `problem`, and a student that is it with noise."""

    NOISE = 2.4
    """Puts it 2 nats away, as far as a student in the middle of training."""

    def __init__(self, seed: int):
        self._seed = seed
        self._teacher = problem.SyntheticTeacher(np.random.default_rng(seed))
        self.token_counts = self._teacher.token_counts(np.random.default_rng(seed))

    def batches(self, split: str, start: int, tokens: int) -> Iterator[Batch]:
        for index in range(start // BATCH, (start + tokens) // BATCH):
            seed = (self._seed, split == "train", index)
            rng = np.random.default_rng(seed)
            yield _with_noise(self._teacher.logits(rng, BATCH), rng.integers(1 << 31), self.NOISE)


@jax.jit
def _with_noise(teacher_NV: jax.Array, seed: int, scale: float) -> Batch:
    noise, labels = jax.random.split(jax.random.key(seed))
    student_NV = teacher_NV + scale * jax.random.normal(noise, teacher_NV.shape)
    return Batch(teacher_NV, student_NV, jax.random.categorical(labels, teacher_NV))


class SmolLM2:
    """A real model on real text; the student lacks some of its layers."""

    def __init__(self, seed: int):
        self._config = data.CorpusConfig(held_out_fraction=0.1, out_of_domain=None, seed=seed)
        self._tokenizer = data.load_tokenizer(problem.SMOLLM2)
        self._model = models.load(problem.SMOLLM2)
        layers = self._model.config.layers
        kept = np.array([layer for layer in range(layers) if layer not in DROPPED])
        whole = self._model.params
        cut = {**whole, "layers": jax.tree.map(lambda x: x[kept], whole["layers"])}
        shorter = dataclasses.replace(self._model.config, layers=len(kept))
        self._student = models.Model(shorter, cut)

    @functools.cached_property
    def token_counts(self) -> np.ndarray:
        ids = np.concatenate([np.array(document) for document in self._documents("train")])
        return np.bincount(ids, minlength=self._tokenizer.vocab_size)

    def batches(self, split: str, start: int, tokens: int) -> Iterator[Batch]:
        rows = itertools.islice(
            data.pack(self._documents(split), ROW), start // ROW, (start + tokens) // ROW
        )
        both = (self._model, self._student)
        while some := list(itertools.islice(rows, _ROWS_AT_ONCE)):
            tokens_BT, segment_ids_BT = (np.stack(x) for x in zip(*some))
            following_BT, where_BT = data.next_token_labels(tokens_BT, segment_ids_BT)
            labels_N = np.where(where_BT, following_BT, -1).ravel()
            hidden = [_hidden(m.config, m.params, tokens_BT, segment_ids_BT) for m in both]
            for first in range(0, labels_N.size, BATCH):
                chunk = slice(first, first + BATCH)
                logits = (_logits(m.params, h_ND[chunk]) for m, h_ND in zip(both, hidden))
                yield Batch(*logits, labels_N[chunk])

    def _documents(self, split: str) -> Iterator[list[int]]:
        texts = (text for kind, text in data.passages(self._config) if kind == split)
        return (self._tokenizer.encode(text, bos=self._tokenizer.adds_bos) for text in texts)


@functools.partial(jax.jit, static_argnums=0)
def _hidden(
    config: models.LlamaConfig, params: Any, tokens_BT: jax.Array, segment_ids_BT: jax.Array
) -> jax.Array:
    """[N, D]."""
    hidden_BTD = models.hidden_states(config, params, tokens_BT, segment_ids_BT)
    return hidden_BTD.reshape(-1, config.embed)


@jax.jit
def _logits(params: Any, hidden_ND: jax.Array) -> jax.Array:
    return hidden_ND @ models.unembedding(params)


SOURCES = {"synthetic": Synthetic, "smollm2": SmolLM2}
"""By name."""
