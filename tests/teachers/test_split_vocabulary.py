"""Schemes on eight devices that share the vocabulary: nothing is gathered, nothing changes."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from distill_jax import teachers
from distill_jax.teachers import sampling

from .test_schemes import encode, keys

TOKENS, VOCAB = 32, 8 * 515
SCHEMES = [
    teachers.TopK(k=6),
    teachers.TopK(k=600),
    teachers.RandomSampling(draws=40),
    teachers.Threshold(tau=0.03),
    teachers.Threshold(ids=12),
]


def make_logits():
    logits = 3 * np.random.default_rng(0).standard_normal((TOKENS, VOCAB)).astype(np.float32)
    logits[0] = np.where(np.arange(VOCAB) == VOCAB - 3, 0.0, -50.0)
    logits[1] = np.round(logits[1])
    logits[2] = 0
    logits[3, : VOCAB // 2] = -np.inf
    return logits


def split_encode(scheme, temperature):
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    return jax.jit(
        jax.shard_map(
            lambda *arrays: scheme.encode(*arrays, temperature, "tensor"),
            mesh=mesh,
            in_specs=(P("data", "tensor"), P("data"), P("data")),
            out_specs=P("data"),
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_split_over_devices_nothing_changes(scheme):
    labels = np.random.default_rng(1).integers(-1, VOCAB, TOKENS)
    whole = encode(scheme, make_logits(), keys(TOKENS), 1.5, labels)
    split = split_encode(scheme, 1.5)(make_logits(), labels, keys(TOKENS))
    assert whole.keys() == split.keys()
    for name, values in whole.items():
        if values.dtype.kind == "i":
            np.testing.assert_array_equal(split[name], values, err_msg=name)
        else:
            np.testing.assert_allclose(split[name], values, rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_logits_travel(scheme):
    """Read in the compiled program: what any collective moves is a few numbers a token."""
    arguments = make_logits(), np.zeros(TOKENS, np.int32), keys(TOKENS)
    text = split_encode(scheme, 1.0).lower(*arguments).compile().as_text()
    sizes = [
        math.prod(int(size) for size in shape.split(",") if size)
        for result in re.findall(
            r"= (.*) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
            r"(?:-start)?\(",
            text,
        )
        for shape in re.findall(r"\w\d+\[([\d,]*)\]", result)
    ]
    shards, local_tokens = 4, TOKENS // 2
    assert sizes
    assert max(sizes) <= shards * local_tokens * scheme.width


@pytest.mark.slow
def test_a_vocabulary_of_fewer_ids_a_device_than_are_kept():
    logits = np.random.default_rng(5).standard_normal((TOKENS, 16)).astype(np.float32)
    labels = np.full(TOKENS, 15)
    for scheme in (teachers.TopK(k=7), teachers.Threshold(ids=7), teachers.Threshold(tau=0.1)):
        whole = encode(scheme, logits, keys(TOKENS), 1.0, labels)
        split = split_encode(scheme, 1.0)(logits, labels, keys(TOKENS))
        np.testing.assert_array_equal(split["ids"], whole["ids"])
        np.testing.assert_allclose(split["log_probs"], whole["log_probs"], rtol=1e-5)


@pytest.mark.slow
def test_sums_of_steps_do_not_depend_on_the_split():
    """Exactly: the same whole numbers, located in one piece and in four."""
    steps = np.random.default_rng(2).integers(0, 2**17, (TOKENS, VOCAB), dtype=np.uint32)
    targets = np.random.default_rng(3).integers(0, steps.sum(axis=-1).min(), (TOKENS, 50))
    whole = sampling.locate(jnp.asarray(steps), jnp.asarray(targets, jnp.uint32))
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.shard_map(
        lambda s, t: sampling.locate(s, t, "tensor"),
        mesh=mesh,
        in_specs=(P(None, "tensor"), P()),
        out_specs=P(),
    )(steps, jnp.asarray(targets, jnp.uint32))
    np.testing.assert_array_equal(split, whole)
