"""Rows that several devices share: each asks the teacher about times of its own."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from distill_jax import models, parallel, teachers
from distill_jax.artifacts import InputError
from distill_jax.teachers import forward

from .known import make_corpus
from .several import MODEL

SCHEMES = {
    "top": teachers.TopK(k=5),
    "random": teachers.RandomSampling(draws=30),
    "threshold": teachers.Threshold(tau=0.04),
}
ROWS, TIME = 4, 16


def make_mesh(data, sequence, tensor):
    devices = np.array(jax.devices()[: data * sequence * tensor])
    return Mesh(devices.reshape(data, sequence, tensor), ("data", "sequence", "tensor"))


def make_batch():
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, MODEL.vocab_size, (ROWS, TIME), np.int32)
    segment_ids = np.ones_like(tokens)
    segment_ids[1, 7:], segment_ids[2, 5:], segment_ids[2, 13:] = 2, 2, 0
    seeds = rng.integers(0, 2**32, (ROWS, 2), np.uint32)
    return tokens, segment_ids, forward.labels(tokens, segment_ids), seeds


def ask(params, batch, sharding, chunk_tokens):
    return forward.ask_teacher(
        params,
        *batch,
        config=MODEL,
        schemes=tuple(SCHEMES.values()),
        temperature=1.5,
        chunk_tokens=chunk_tokens,
        sharding=sharding,
    )


@pytest.mark.parametrize(
    ("shape", "chunk_tokens"),
    [((1, 4, 1), 8), ((2, 2, 2), 16)],  # half a device's times at once, and both its pieces
)
def test_devices_that_share_rows_say_what_one_says(shape, chunk_tokens):
    mesh = make_mesh(*shape)
    params = models.init_params(MODEL, jax.random.key(0))
    params = jax.tree.map(lambda x: 20 * x, params)  # far from uniform
    batch = make_batch()
    places = parallel.shardings(mesh, models.logical_axes(MODEL), params)
    rows = parallel.batch_sharding(mesh, split_time=True)
    alone = ask(params, batch, None, 8)
    placed = jax.device_put(params, places), jax.device_put(batch, rows)
    shared = ask(*placed, rows, chunk_tokens)
    padding = batch[1] == 0
    for scheme, expected, found in zip(SCHEMES, alone, shared, strict=True):
        assert expected.keys() == found.keys()
        for name, values in expected.items():
            values, others = (np.array(x) for x in (values, found[name]))
            values[padding], others[padding] = 0, 0
            said = f"{scheme} {name}"
            if values.dtype.kind == "i":
                np.testing.assert_array_equal(others, values, err_msg=said)
            else:
                np.testing.assert_allclose(others, values, rtol=1e-4, atol=1e-5, err_msg=said)


def test_rows_that_do_not_fall_apart_are_refused_before_anything_starts(tmp_path):
    mesh, corpus = make_mesh(1, 4, 1), make_corpus(4, time=12)
    with pytest.raises(InputError, match="rows of 12 tokens do not divide into 8 pieces"):
        teachers.write_stores(
            {"top": tmp_path / "top"},
            {"top": SCHEMES["top"]},
            models.Model(MODEL, models.abstract_params(MODEL)),
            corpus,
            sharding=parallel.batch_sharding(mesh, split_time=True),
        )
    assert not list(tmp_path.iterdir())
