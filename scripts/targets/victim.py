"""A writer of stores that starts at once, in a process of its own that may be killed.

The teacher is a function of a row's tokens that needs no compiler; all else is `write_stores`.
"""

import dataclasses
import os
import pathlib
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from unittest import mock

import jax
import numpy as np

from distill_jax import models, teachers
from distill_jax.teachers import writer

VOCAB = 500
SCHEMES = {
    "threshold": teachers.Threshold(tau=0.05),
    "random": teachers.RandomSampling(draws=12),
}
# Every process begins as a copy of this one, before any thread of JAX exists.
warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Rows of random tokens, the interface of `data.Corpus`."""

    rows: int = 7
    sequence_length: int = 16
    fingerprint: str = "corpus"
    tokenizer_fingerprint: str = "tokenizer"

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        tokens = np.random.default_rng(index).integers(0, VOCAB, self.sequence_length)
        segment_ids = np.ones_like(tokens)
        return {
            "row_id": index,
            "key": f"{index:032x}",
            "tokens": tokens,
            "segment_ids": segment_ids,
        }


def _ask(params, tokens_BT, segment_ids_BT, labels_BT, seeds, *, schemes, **_):
    """Takes the place of `ask_teacher`: arrays of the right form for every scheme."""
    time, width = tokens_BT.shape[1], max(scheme.width for scheme in schemes)

    def row(tokens_T):
        rng = np.random.default_rng(np.asarray(tokens_T, np.int64))
        length = rng.integers(1, width + 1, time)
        return {
            "length": length,
            "exact": np.minimum(length, 3),
            "entropy": rng.uniform(0, 6, time),
            "label_log_prob": -rng.uniform(0.1, 9, time),
            "ids": np.argsort(rng.random((time, VOCAB)), axis=1)[:, :width],
            "log_probs": -rng.uniform(0, 3, (time, width)),
            "counts": rng.integers(1, 12, (time, width)),
        }

    rows = [row(tokens_T) for tokens_T in np.asarray(tokens_BT)]
    arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return (arrays,) * len(schemes)


def write(directory, corpus=Corpus(), rows_per_shard=3):
    """Writes, or goes on writing, a store for each of `SCHEMES`."""
    config = models.LlamaConfig(
        vocab_size=VOCAB, embed=2, mlp=2, layers=1, heads=1, kv_heads=1, head_dim=2, tied=True
    )
    with (
        mock.patch.object(writer, "ask_teacher", _ask),
        # Nothing for a backend to do, so none is started.
        mock.patch.object(jax, "device_put", lambda arrays, sharding: arrays),
    ):
        teachers.write_stores(
            {name: pathlib.Path(directory) / name for name in SCHEMES},
            SCHEMES,
            models.Model(config, {"embedding": np.ones((VOCAB, 2), np.float32)}),
            corpus,
            config=teachers.WriteConfig(batch_rows=2, rows_per_shard=rows_per_shard),
        )


def start(work: Callable[[], None]) -> int:
    """Process id of a copy of this process that does `work` and ends with status 0, or 1."""
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def wait(process: int) -> int:
    """Its status: 0 done, 1 failed, -9 killed."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def contents(directory) -> dict[str, bytes]:
    """All files below a directory."""
    root = pathlib.Path(directory)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def undisturbed(**options) -> dict[str, bytes]:
    """The files of stores whose writer was left alone."""
    with tempfile.TemporaryDirectory() as directory:
        assert wait(start(lambda: write(directory, **options))) == 0
        return contents(directory)
