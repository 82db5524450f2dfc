"""One of several processes that write stores together: python -m teachers.several DIRECTORY.

A further argument, "everything", lets them fail, share rows, and wait to be killed, too.
"""

import contextlib
import json
import pathlib
import sys
import time
from unittest import mock

import jax
import numpy as np
from jax.sharding import Mesh

from distill_jax import models, parallel, teachers
from distill_jax.teachers.shards import StoreWriter

from .known import ListCorpus, make_corpus

SCHEMES = {"top": teachers.TopK(k=5), "threshold": teachers.Threshold(tau=0.04)}
# Two rows on each of four devices, in every number of processes.
CONFIG = teachers.WriteConfig(batch_rows=8, rows_per_shard=3, chunk_tokens=96)
MODEL = models.LlamaConfig(
    vocab_size=300, embed=16, mlp=32, layers=2, heads=4, kv_heads=2, head_dim=8, tied=True
)
MESHES = {"rows": (2, 2, 1, 1), "vocabulary": (1, 1, 1, 4), "times": (1, 1, 2, 2)}
CORPUS = make_corpus(22)


class Slow(ListCorpus):
    """Rows that take their time once tokens have been counted."""

    read = 0

    def __getitem__(self, index):
        self.read += 1
        if self.read > len(self):
            time.sleep(0.1)
        return super().__getitem__(index)


def write(directory, kind="rows", corpus=CORPUS, **options):
    """Writes, or goes on writing, a store for each of `SCHEMES` with all devices of a mesh."""
    devices = np.array(jax.devices()[:4]).reshape(MESHES[kind])
    mesh = Mesh(devices, ("data", "fsdp", "sequence", "tensor"))
    shapes = models.abstract_params(MODEL)
    shardings = parallel.shardings(mesh, models.logical_axes(MODEL), shapes)
    rng = np.random.default_rng(0)
    values = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32) / 2, shapes)
    params = jax.tree.map(
        lambda value, place: jax.make_array_from_callback(value.shape, place, value.__getitem__),
        values,
        shardings,
    )
    return teachers.write_stores(
        {name: pathlib.Path(directory) / name for name in SCHEMES},
        SCHEMES,
        models.Model(MODEL, params),
        corpus,
        config=CONFIG,
        sharding=parallel.batch_sharding(mesh, split_time=True),
        **options,
    )


@contextlib.contextmanager
def _watched():
    """The shards that this process commits in the block."""
    commit, commits = StoreWriter.commit, []

    def watch(self, shard, records):
        commits.append(shard)
        commit(self, shard, records)

    with mock.patch.object(StoreWriter, "commit", watch):
        yield commits


def _fails(directory):
    """What this process says when the second shard of process 1 meets a full disk."""
    commit, commits = StoreWriter.commit, []

    def full(self, shard, records):
        commits.append(shard)
        if jax.process_index() == 1 and len(commits) > len(SCHEMES):
            raise OSError("no space left on device")
        commit(self, shard, records)

    with mock.patch.object(StoreWriter, "commit", full):
        try:
            write(directory)
        except (OSError, parallel.ProcessError) as error:
            return f"{type(error).__name__}: {error}"
    return None


def main(directory, everything):
    """Leaves a JSON file of what happened; at the end writes so slowly that it can be killed."""
    parallel.start()
    root = pathlib.Path(directory)
    with _watched() as commits:
        result = {"figures": write(root / "whole"), "shards": commits}
    if everything:
        result["failure"] = _fails(root / "failed")
        write(root / "failed")
        for kind in ("vocabulary", "times"):
            with _watched() as result[f"shards of shared {kind}"]:
                write(root / kind, kind)
    (root / f"result-{jax.process_index()}.json").write_text(json.dumps(result))
    if everything:
        write(root / "killed", corpus=Slow(CORPUS.rows))


if __name__ == "__main__":
    main(sys.argv[1], everything="everything" in sys.argv[2:])
