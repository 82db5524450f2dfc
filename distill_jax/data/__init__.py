"""Tokenizers, corpora of packed rows, and the batches that every loop reads."""

from distill_jax.data.corpus import (
    SPLITS,
    Corpus,
    CorpusConfig,
    Write,
    build_corpus,
    open_corpus,
    passages,
)
from distill_jax.data.packing import next_token_labels, pack, row_key
from distill_jax.data.pipeline import RowSource, batches, to_example
from distill_jax.data.records import BadRows, Record, Rejects, read_records
from distill_jax.data.texts import read_texts
from distill_jax.data.tokenizer import Tokenizer, train_tokenizer
from distill_jax.data.tokenizer_files import load_tokenizer

__all__ = [
    "SPLITS",
    "BadRows",
    "Corpus",
    "CorpusConfig",
    "Record",
    "Rejects",
    "RowSource",
    "Tokenizer",
    "Write",
    "batches",
    "build_corpus",
    "load_tokenizer",
    "next_token_labels",
    "open_corpus",
    "pack",
    "passages",
    "read_records",
    "read_texts",
    "row_key",
    "to_example",
    "train_tokenizer",
]
