import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from distill_jax import models, parallel
from distill_jax.artifacts import InputError
from distill_jax.parallel import mesh as mesh_module

CONFIG = models.LlamaConfig(
    vocab_size=64, embed=16, mlp=32, layers=3, heads=4, kv_heads=1, head_dim=8, tied=True
)


def test_shardings_follow_the_rules_and_leave_whole_what_does_not_divide():
    mesh = parallel.make_mesh(parallel.MeshConfig(data=2, fsdp=2, tensor=2))
    specs = jax.tree.map(
        lambda s: s.spec,
        parallel.shardings(mesh, models.logical_axes(CONFIG), models.abstract_params(CONFIG)),
    )
    assert specs["embedding"] == P("tensor", "fsdp")
    assert specs["layers"]["attention"]["query"] == P(None, "fsdp", "tensor", None)
    assert specs["layers"]["attention"]["key"] == P(None, "fsdp", None, None)  # 1 KV head
    assert specs["layers"]["mlp"]["down"] == P(None, "tensor", "fsdp")


@pytest.mark.slow
def test_sharded_logits_equal_one_device():
    params = models.init_params(CONFIG, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (4, 12), 0, CONFIG.vocab_size)
    expected = models.logits(CONFIG, params, tokens)
    mesh = parallel.make_mesh(parallel.MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(params, parallel.shardings(mesh, models.logical_axes(CONFIG), params))
    rows = jax.device_put(tokens, parallel.batch_sharding(mesh))
    actual = jax.jit(lambda p, t: models.logits(CONFIG, p, t))(placed, rows)
    assert len(actual.sharding.device_set) == 8
    assert jnp.allclose(actual, expected, atol=1e-5)


class Chip(NamedTuple):
    """A device of a slice, as far as its place matters."""

    coords: tuple[int, ...]


@pytest.mark.parametrize(
    ("slice_", "fsdp", "minor"),
    [((16, 16, 1), 256, 16), ((4, 4, 8), 128, 8), ((16, 16, 1), 16, 1), ((8, 1, 1), 8, 1)],
)
def test_what_fsdp_splits_lies_along_two_axes_of_a_slice(slice_, fsdp, minor):
    chips = [Chip(place) for place in itertools.product(*map(range, slice_))]
    assert mesh_module._minor(fsdp, chips) == minor


def test_a_second_axis_of_fsdp():
    mesh = parallel.make_mesh(parallel.MeshConfig(fsdp=4, fsdp_minor=2, tensor=2))
    assert tuple(mesh.shape.values()) == (1, 2, 2, 1, 2)
    sizes = {"data": 1, "fsdp": 4, "fsdp_minor": 2, "sequence": 1, "tensor": 2}
    assert parallel.mesh_sizes(mesh) == sizes
    assert parallel.make_mesh(parallel.MeshConfig(**sizes)) == mesh
    assert parallel.row_shards(mesh) == 4
    odd = {"even": ("embed",), "odd": ("embed",)}
    sizes = {"even": jax.ShapeDtypeStruct((8,), "float32"), "odd": jax.ShapeDtypeStruct((6,), "i4")}
    found = jax.tree.map(lambda s: s.spec, parallel.shardings(mesh, odd, sizes))
    assert found == {"even": P(("fsdp", "fsdp_minor")), "odd": P("fsdp")}
    with pytest.raises(InputError, match="fsdp_minor=3 does not divide fsdp=8"):
        parallel.make_mesh(parallel.MeshConfig(fsdp_minor=3))


def test_devices_that_share_rows_where_they_can():
    mesh = parallel.make_mesh(parallel.MeshConfig(data=2, sequence=4))
    assert (parallel.row_shards(mesh), parallel.time_shards(mesh)) == (8, 4)
    assert parallel.row_shards(mesh, split_time=True) == 2
    assert [parallel.whole_batch(rows, mesh) for rows in (1, 8, 9)] == [8, 8, 16]
    assert parallel.whole_batch(3, mesh, split_time=True) == 4
    assert parallel.whole_batch(3, None) == 3
    rows = parallel.batch_sharding(mesh, split_time=True)
    assert rows.shard_shape((4, 16)) == (2, 16)
    assert parallel.batch_sharding(mesh).shard_shape((8, 16)) == (1, 16)
    table = jax.ShapeDtypeStruct((64, 16), "float32")
    (found,) = jax.tree.leaves(parallel.shardings(mesh, [("vocab", "embed")], [table]))
    assert found.shard_shape(table.shape) == (64, 4)


@pytest.mark.parametrize("sizes", [(3, -1, 1), (2, 2, 1), (-1, -1, 1), (16, -1, 1)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes):
    data, fsdp, tensor = sizes
    with pytest.raises(InputError, match="does not arrange 8 devices"):
        parallel.make_mesh(parallel.MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
