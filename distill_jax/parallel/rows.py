"""Rows that every process feeds to, and takes back from, computations of all processes."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from distill_jax.artifacts import InputError
from distill_jax.parallel import processes
from distill_jax.parallel.mesh import names_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowShare:
    """The part of every batch that is this process's; made by `row_share`.

    Processes between which only other axes than the rows lie split have the same part.

    Attributes:
      sharding: of a batch; None leaves the one process's rows to JAX.
      blocks: which of the blocks that the sharding cuts rows into are here, rising.
      index: the number of this part.
      count: how many parts a batch has.
      member: the number of this process among those that have the same part.
      members: how many have it.
    """

    sharding: NamedSharding | None = None
    blocks: tuple[int, ...] = (0,)
    index: int = 0
    count: int = 1
    member: int = 0
    members: int = 1

    def put(self, tree: Any) -> Any:
        """Global arrays [rows of all parts, ...] of this part's NumPy arrays [rows, ...]."""
        if self.sharding is None:
            return jax.device_put(tree, None)
        return jax.tree.map(self._put, tree)

    def take(self, tree: Any) -> Any:
        """This part's rows, as NumPy, of global arrays that lie as `sharding` says."""
        if self.sharding is None:
            return jax.device_get(tree)
        return jax.tree.map(_take, tree)

    def _put(self, rows: np.ndarray) -> jax.Array:
        assert self.sharding is not None  # `put` deals with that
        size = len(rows) // len(self.blocks)

        def block(place: tuple[slice, ...] | None) -> np.ndarray:
            assert place is not None  # JAX gives one for every device
            first = self.blocks.index((place[0].start or 0) // size) * size
            return rows[first : first + size]

        shape = (len(rows) * self.count, *rows.shape[1:])
        return jax.make_array_from_callback(shape, self.sharding, block)


def _take(array: jax.Array) -> np.ndarray:
    parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def to_host(tree: Any) -> Any:
    """A tree of arrays, global ones among them, as NumPy; all processes call it together."""

    def fetch(array: Any) -> np.ndarray:
        here = not isinstance(array, jax.Array) or array.is_fully_addressable
        if here or array.is_fully_replicated:
            return np.asarray(array)
        return multihost_utils.process_allgather(array, tiled=True)

    return jax.tree.map(fetch, tree)


def row_share(sharding: NamedSharding | None) -> RowShare:
    """Which rows of a batch are this process's.

    Raises:
      InputError: several processes without a sharding, or one that gives a process some of the
        rows of another and not all.
    """
    if sharding is None:
        if processes.count() > 1:
            raise InputError(f"sharding: {processes.count()} processes need one for their rows")
        return RowShare()
    names = names_of(sharding.spec[0] if len(sharding.spec) else None)
    number = math.prod(sharding.mesh.shape[name] for name in names)
    held: dict[int, set[int]] = {}
    device: Any
    for device, place in sharding.devices_indices_map((number,)).items():
        held.setdefault(device.process_index, set()).add(place[0].start or 0)
    parts = sorted({tuple(sorted(blocks)) for blocks in held.values()})
    if len(parts) * len(parts[0]) != number or len({len(part) for part in parts}) > 1:
        raise InputError(
            f"mesh {dict(sharding.mesh.shape)}: its rows do not fall apart into equal parts of "
            f"{len(held)} processes; let each process's devices form whole groups of the axes "
            "that do not split rows"
        )
    own = tuple(sorted(held[processes.index()]))
    same = sorted(process for process, blocks in held.items() if tuple(sorted(blocks)) == own)
    return RowShare(
        sharding=sharding,
        blocks=own,
        index=parts.index(own),
        count=len(parts),
        member=same.index(processes.index()),
        members=len(same),
    )
