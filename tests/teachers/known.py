"""A teacher and corpora small enough to know everything about."""

import dataclasses
import hashlib

import jax.numpy as jnp
import numpy as np

from distill_jax import models

VOCAB, TIME = 300, 12


@dataclasses.dataclass
class ListCorpus:
    """A corpus in memory, with the interface of `data.Corpus`."""

    rows: list
    fingerprint: str = "corpus-a"
    tokenizer_fingerprint: str = "tokenizer-a"
    sequence_length: int = TIME

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        tokens, segment_ids = self.rows[index]
        key = hashlib.sha256(tokens.tobytes() + segment_ids.tobytes()).hexdigest()[:32]
        return {"row_id": index, "key": key, "tokens": tokens, "segment_ids": segment_ids}


def make_corpus(rows, seed=0, vocab=VOCAB, time=TIME):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(rows):
        real = int(rng.integers(time // 2, time + 1))
        segment_ids = np.where(np.arange(time) < real, 1, 0).astype(np.int32)
        made.append((rng.integers(0, vocab, time).astype(np.int32) * segment_ids, segment_ids))
    return ListCorpus(made, sequence_length=time)


@dataclasses.dataclass(frozen=True)
class TableTeacher:
    """A teacher whose logits after a token are a row of a table.

    Its unembedding is the identity, so every logit is exact in any order of summation.
    """

    table: np.ndarray

    @property
    def model(self):
        vocab = len(self.table)
        config = models.LlamaConfig(
            vocab_size=vocab, embed=vocab, mlp=2, layers=1, heads=1, kv_heads=1, head_dim=2,
            tied=False,
        )  # fmt: skip
        params = {"embedding": jnp.asarray(self.table), "unembedding": jnp.eye(vocab)}
        return models.Model(config, params)

    @staticmethod
    def hidden_states(config, params, tokens_BT, segment_ids_BT=None):
        return params["embedding"][tokens_BT]


def make_teacher(seed=1, vocab=VOCAB):
    rng = np.random.default_rng(seed)
    return TableTeacher((3 * rng.standard_normal((vocab, vocab))).astype(np.float32))
