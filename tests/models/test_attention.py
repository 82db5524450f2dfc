import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec

from distill_jax import parallel
from distill_jax.models import attention
from distill_jax.models.times import Times

B, T, H, K, C = 2, 256, 4, 2, 16


def arrays(time=T):
    rng = np.random.default_rng(0)
    shapes = {"query": (B, time, H, C), "key": (B, time, K, C), "value": (B, time, K, C)}
    return [rng.standard_normal(shape, np.float32) for shape in shapes.values()]


def segments(time=T):
    """Documents that end inside of and between the kernel's blocks, and padding."""
    ids = np.ones((B, time), np.int32)
    ids[0, 100:] = 2
    ids[1, 128:] = 2
    ids[1, 200:] = 0
    return ids


def by_hand(query, key, value, segment_ids):
    """Softmax attention in float64, head by head."""
    out = np.zeros(query.shape)
    before = np.tri(query.shape[1], dtype=bool)
    for row in range(B):
        same = segment_ids[row][:, None] == segment_ids[row][None]
        for head in range(H):
            k, v = (x[row, :, head // (H // K)].astype(np.float64) for x in (key, value))
            scores = query[row, :, head].astype(np.float64) @ k.T / np.sqrt(C)
            scores = np.where(before & same, scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[row, :, head] = weights / weights.sum(axis=-1, keepdims=True) @ v
    return out


@pytest.fixture
def interpreted(monkeypatch):
    """The TPU's kernel, run by an interpreter."""
    monkeypatch.setattr(attention, "_kernels", lambda: True)
    monkeypatch.setattr(attention, "_BLOCK", T // 2)
    kernel = functools.partial(splash_attention.make_splash_mha, interpret=True)
    monkeypatch.setattr(attention.splash, "make_splash_mha", kernel)


def attended(query, key, value):
    return attention.segment_attention(jnp.asarray(segments()))(query, key, value, None)[0]


def slopes(query, key, value):
    weights = np.random.default_rng(1).standard_normal(query.shape, np.float32)
    total = lambda *inputs: jnp.sum(weights * attended(*inputs))  # noqa: E731
    return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(query, key, value)


def test_attention_by_hand():
    expected = by_hand(*arrays(), segments())
    np.testing.assert_allclose(attended(*arrays()), expected, atol=2e-6)


def test_the_kernel_by_hand_and_its_gradient(interpreted, monkeypatch):
    expected = by_hand(*arrays(), segments())
    np.testing.assert_allclose(attended(*arrays()), expected, atol=2e-6)
    found = slopes(*arrays())
    monkeypatch.setattr(attention, "_kernels", lambda: False)
    chex.assert_trees_all_close(found, slopes(*arrays()), atol=1e-4)


@pytest.mark.parametrize("tensor", [2, 4])
def test_heads_that_a_mesh_splits_or_cannot(interpreted, tensor):
    """Two key/value heads: two shards have one each, and four all of them."""
    mesh = parallel.make_mesh(
        parallel.MeshConfig(data=2, fsdp=1, tensor=tensor), jax.devices()[: 2 * tensor]
    )
    rows = PartitionSpec("data")

    def of_rows(query, key, value, ids):
        return attention.segment_attention(ids)(query, key, value, None)[0]

    run = jax.shard_map(
        of_rows,
        mesh=mesh,
        in_specs=(rows,) * 4,
        out_specs=rows,
        axis_names={"data", "fsdp", "fsdp_minor"},
        check_vma=False,
    )
    found = jax.jit(run)(*arrays(), jnp.asarray(segments()))
    np.testing.assert_allclose(found, by_hand(*arrays(), segments()), atol=2e-6)


@pytest.mark.parametrize("kernels", [True, False])
def test_rows_of_devices_whose_other_work_the_compiler_splits(request, monkeypatch, kernels):
    """The kernel sees what one device has: two rows on a mesh of two by two."""
    if kernels:
        request.getfixturevalue("interpreted")
    mesh = parallel.make_mesh(parallel.MeshConfig(data=2, fsdp=1, tensor=2), jax.devices()[:4])
    rows, ids = parallel.batch_sharding(mesh), jnp.asarray(segments())
    seen, run = [], attention._splash if kernels else attention._in_tiles
    spied = lambda ids, times, query, *rest: (  # noqa: E731
        seen.append(query.shape[0]) or run(ids, times, query, *rest)
    )
    monkeypatch.setattr(attention, run.__name__, spied)
    attend = jax.jit(lambda *inputs: attention.segment_attention(ids, rows=rows)(*inputs, None)[0])
    np.testing.assert_allclose(attend(*arrays()), by_hand(*arrays(), segments()), atol=2e-6)
    assert seen == [1]


def sharing(shards, tensor):
    """Attention of rows that devices share, and how much each has to do with the mask given."""
    config = parallel.MeshConfig(fsdp=1, sequence=shards, tensor=tensor)
    mesh = parallel.make_mesh(config, jax.devices()[: shards * tensor])
    times = Times("sequence", shards)

    def of_device(query, key, value, ids):
        attend = attention.segment_attention(ids, times)
        return attend(*times.own((query, key, value)), None)[0]

    run = jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(None, "sequence"),
        axis_names={"data", "fsdp", "fsdp_minor", "sequence"},
        check_vma=False,
    )
    return lambda *inputs: run(*inputs)[:, np.argsort(times.order(inputs[0].shape[1]))]


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize(("shards", "tensor"), [(2, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_devices_that_share_rows(request, kernels, shards, tensor):
    if kernels:
        request.getfixturevalue("interpreted")
    time = 256 * shards
    inputs, ids = arrays(time), jnp.asarray(segments(time))
    attend = jax.jit(sharing(shards, tensor))
    expected = by_hand(*inputs, segments(time))
    np.testing.assert_allclose(attend(*inputs, ids), expected, atol=3e-6)
    weights = np.random.default_rng(1).standard_normal(expected.shape, np.float32)
    alone = lambda *inputs, ids: attention.segment_attention(ids)(*inputs, None)[0]  # noqa: E731

    def slopes(attend):
        total = lambda *inputs: jnp.sum(weights * attend(*inputs))  # noqa: E731
        return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*inputs)

    found = slopes(lambda *inputs: attend(*inputs, ids))
    request.getfixturevalue("monkeypatch").setattr(attention, "_kernels", lambda: False)
    chex.assert_trees_all_close(found, slopes(functools.partial(alone, ids=ids)), atol=1e-4)


def test_lengths_that_no_block_divides_are_left_to_xla(interpreted):
    short = [x[:, :100] for x in arrays()]
    ids = jnp.asarray(segments()[:, :100])
    found, _ = attention.segment_attention(ids)(*short, None)
    np.testing.assert_allclose(found, by_hand(*arrays(), segments())[:, :100], atol=2e-6)


@pytest.mark.parametrize(
    ("platform", "manual", "size", "kernels"),
    [
        ("tpu", ("data",), 4, True),
        ("tpu", (), 1, True),
        ("tpu", (), 4, False),  # the compiler cannot split a kernel
        ("cpu", ("data",), 4, False),
    ],
)
def test_kernels_are_for_tpus_where_a_device_works_alone(
    monkeypatch, platform, manual, size, kernels
):
    device = types.SimpleNamespace(platform=platform)
    mesh = types.SimpleNamespace(empty=False, abstract_device=device, manual_axes=manual, size=size)
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
    assert attention._kernels() is kernels
