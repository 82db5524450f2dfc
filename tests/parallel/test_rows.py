import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distill_jax import parallel
from distill_jax.artifacts import InputError
from distill_jax.parallel import processes


def share_of(monkeypatch, process, devices_of):
    """The share of one process if a mesh [rows, tensor] holds devices of these processes."""
    devices_of = np.asarray(devices_of)
    monkeypatch.setattr(processes, "count", lambda: 9)
    monkeypatch.setattr(processes, "index", lambda: process)
    places = [
        (SimpleNamespace(process_index=int(owner)), (slice(row, row + 1),))
        for (row, _), owner in np.ndenumerate(devices_of)
    ]
    sharding = SimpleNamespace(
        spec=PartitionSpec("data"),
        mesh=SimpleNamespace(shape={"data": len(devices_of), "tensor": devices_of.shape[1]}),
        devices_indices_map=lambda shape: SimpleNamespace(items=lambda: places),
    )
    return dataclasses.replace(parallel.row_share(sharding), sharding=None)


@pytest.mark.parametrize(
    ("process", "devices_of", "expected"),
    [
        # Each process has rows of its own, however its devices lie in the mesh.
        (1, [[0], [0], [1], [1]], {"blocks": (2, 3), "index": 1, "count": 2}),
        (1, [[1], [0], [0], [1]], {"blocks": (0, 3), "index": 0, "count": 2}),
        (2, [[0, 0], [1, 1], [2, 2]], {"blocks": (2,), "index": 2, "count": 3}),
        # The vocabulary is split over two processes, which then hold the same rows.
        (2, [[0, 1], [2, 3]], {"blocks": (1,), "index": 1, "count": 2, "members": 2}),
        (3, [[0, 1], [2, 3]], {"blocks": (1,), "index": 1, "count": 2, "member": 1, "members": 2}),
        (1, [[0, 1], [0, 1]], {"blocks": (0, 1), "member": 1, "members": 2}),
    ],
)
def test_whose_rows_are_whose(monkeypatch, process, devices_of, expected):
    found = share_of(monkeypatch, process, devices_of)
    assert found == parallel.RowShare(**expected)


@pytest.mark.parametrize(
    "devices_of",
    [
        [[0, 0], [0, 1], [1, 1]],  # the middle row is of both, the others are not
        [[0], [0], [1]],  # a part of two rows, a part of one
        [[0], [0], [1], [2], [2], [2]],
    ],
)
def test_rows_shared_in_part_are_refused(monkeypatch, devices_of):
    with pytest.raises(InputError, match=r"mesh .*: its rows do not fall apart into equal parts"):
        share_of(monkeypatch, 0, devices_of)


def test_processes_without_a_sharding_are_refused(monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(InputError, match="sharding: 2 processes need one"):
        parallel.row_share(None)


@pytest.mark.parametrize("axes", ["data", ("data", "tensor"), ("tensor", "data"), None])
def test_rows_come_back_in_the_order_they_went(axes):
    """On devices that lie in the mesh in another order than their numbers."""
    order = np.random.default_rng(0).permutation(8)
    mesh = Mesh(np.array(jax.devices())[order].reshape(4, 2), ("data", "tensor"))
    share = parallel.row_share(NamedSharding(mesh, PartitionSpec(axes)))
    rows = {"a": np.arange(48.0).reshape(16, 3), "b": np.arange(16, dtype=np.int32)}
    there = share.put(rows)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(there), rows)
    jax.tree.map(np.testing.assert_array_equal, share.take(there), rows)
