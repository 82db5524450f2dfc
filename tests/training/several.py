"""One of several processes that train together: python several.py DIRECTORY ROLE."""

import dataclasses
import hashlib
import json
import os
import pathlib
import signal
import sys
import time

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax import data, losses, models, parallel
from distill_jax.parallel import stopping
from distill_jax.training import TrainConfig, language_model_loss, train

from .bigrams import bigram_loss

CONFIG = models.LlamaConfig(
    vocab_size=32, embed=16, mlp=32, layers=2, heads=4, kv_heads=2, head_dim=4, tied=True
)
TEACHER = dataclasses.replace(CONFIG, embed=24, layers=1, kv_heads=4, tied=False)
TRAIN = TrainConfig(steps=16, batch_rows=8, checkpoint_every=100)
FSDP = parallel.MeshConfig(fsdp=2, data=-1)
"""Every process has whole parameters."""
SHARES = parallel.MeshConfig()
"""Of every parameter each device has a share."""
SHARED = parallel.MeshConfig(fsdp=1, sequence=4)
"""All devices, those of other processes too, have parts of the same rows."""


def rows(count=28, time=8):
    rng = np.random.default_rng(0)
    segments = np.repeat([1, 2, 0], [4, 3, time - 7]).astype(np.int32)
    return [
        {"tokens": rng.integers(0, 32, time).astype(np.int32), "segment_ids": segments}
        for _ in range(count)
    ]


class Disturbed:
    """An iterator that does something before it gives a certain batch of this call."""

    def __init__(self, iterator, number, deed):
        self._iterator, self._left, self._deed = iterator, number, deed

    def __next__(self):
        self._left -= 1
        if not self._left:
            self._deed()
        return next(self._iterator)

    def get_state(self):
        return self._iterator.get_state()

    def set_state(self, state):
        self._iterator.set_state(state)


def told():
    """SIGTERM to this process, and time for several to agree."""
    os.kill(os.getpid(), signal.SIGTERM)
    while parallel.count() > 1 and stopping._State.last is None:
        time.sleep(0.05)


def random_model(config, mesh):
    """A model of random parameters, each where it lives."""
    shapes = models.abstract_params(config)
    rng = np.random.default_rng(1)
    values = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32) / 4, shapes)
    places = parallel.shardings(mesh, models.logical_axes(config), shapes)
    params = jax.tree.map(
        lambda value, place: jax.make_array_from_callback(value.shape, place, value.__getitem__),
        values,
        places,
    )
    return models.Model(config, params)


def run(directory, *, devices=None, mesh=FSDP, disturbed=None):
    """Trains, or goes on, with some devices of all processes.

    Args:
      directory: of the run; one called "model..." is of a language model, one called "live..." of
        one with a teacher of another shape beside it, others of bigrams.
      devices: how many of all; None for every one.
      mesh: how they are arranged.
      disturbed: (number, deed) of a batch before which this process does something.
    """
    mesh = parallel.make_mesh(mesh, None if devices is None else jax.devices()[:devices])
    share = parallel.row_share(parallel.batch_sharding(mesh, split_time=True))
    batches = data.batches(
        rows(), batch_rows=8, seed=5, process_index=share.index, process_count=share.count
    )
    if disturbed is not None:
        batches = Disturbed(batches, *disturbed)
    loss_fn, teachers = bigram_loss, {}
    if directory.name.startswith("model"):
        loss_fn = language_model_loss(CONFIG, losses.hard_labels(), mesh=mesh)
    if directory.name.startswith("live"):
        teachers = {"live": random_model(TEACHER, mesh)}
        objective = losses.distill("live", losses.forward_kl)
        loss_fn = language_model_loss(CONFIG, objective, live={"live": TEACHER}, mesh=mesh)
    with parallel.stoppable():
        return train(
            random_model(CONFIG, mesh),
            loss_fn,
            batches,
            TRAIN,
            directory,
            teachers=teachers,
            mesh=mesh,
            split_time=True,
        )


def stopped(directory, **options):
    """The step at which a run stops that is told to."""
    try:
        run(directory, **options)
    except parallel.Preempted as error:
        return int(str(error).rpartition(" ")[2])
    return None


def texts(mesh=FSDP):
    """What a model of random parameters writes, of whose rows each device has its own."""
    mesh = parallel.make_mesh(mesh)
    completions = models.generate(
        random_model(CONFIG, mesh),
        [[1, 2, 3]] * 5 + [[4, 5]] * 7,
        max_new_tokens=6,
        sampling=models.Sampling(),
        seeds=range(12),
        batch_rows=8,
        sharding=parallel.batch_sharding(mesh),
    )
    return [completion.tokens for completion in completions]


def digest(model):
    """Stands for all bits of a model."""
    whole = NamedSharding(parallel.make_mesh(), PartitionSpec())
    params = jax.jit(lambda params: params, out_shardings=whole)(model.params)
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        found.update(np.asarray(leaf.addressable_data(0)).tobytes())
    return found.hexdigest()


def begin(root, second):
    """Undisturbed runs, and one that stops; the second process alone is told so."""
    whole = digest(run(root / "two"))
    run(root / "model-two", mesh=SHARED)
    run(root / "live-two", mesh=SHARES)
    step = stopped(root / "cycle", disturbed=(4, told) if second else None)
    return {"digest": whole, "stopped": step, "texts": texts()}


def end(root, second):
    """Goes on with what was stopped, and with what stopped when it was two processes', too."""
    run(root / "cycle")
    return {"digest": digest(run(root / "again"))}


def hang(root, second):
    run(root / "hung", disturbed=(3, lambda: time.sleep(1000)) if second else None)


def die(root, second):
    end = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    run(root / "dead", disturbed=(3, end) if second else None)


def main(directory, role):
    parallel.start()
    with parallel.together():
        print(json.dumps(globals()[role](pathlib.Path(directory), parallel.index() == 1)))


if __name__ == "__main__":
    main(*sys.argv[1:])
