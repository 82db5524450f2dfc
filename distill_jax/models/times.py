"""Rows of which several devices have a part each: context parallelism.

Since a token attends to those before it alone, the end of a row is more work than its beginning:
every device takes one piece from the front half and the one as far from the end, and of attention's
keys and values, which are few, it gathers all (Llama 3, Dubey et al. 2024, section 3.3.2).

Dimensions: B rows, T times of a row, t those of a device.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from distill_jax.artifacts import InputError


@dataclasses.dataclass(frozen=True)
class Times:
    """Which times of its rows are a device's, inside of a `shard_map` over the axis.

    Attributes:
      axis: the mesh axis whose devices share rows.
      shards: how many there are.
    """

    axis: str
    shards: int

    def check(self, time: int) -> None:
        """Raises InputError for rows that do not fall apart into two pieces for each device."""
        if time % (2 * self.shards):
            raise InputError(f"rows of {time} tokens do not divide into {2 * self.shards} pieces")

    def device(self) -> Array:
        """The number of this device among those that share rows."""
        return jax.lax.axis_index(self.axis)

    def own(self, tree: Any) -> Any:
        """Arrays [B, t, ...] of this device's times, of arrays [B, T, ...] of all."""
        device = self.device()

        def own(array_BT: Array) -> Array:
            self.check(array_BT.shape[1])
            size = array_BT.shape[1] // (2 * self.shards)
            pieces = (device, 2 * self.shards - 1 - device)
            return jnp.concatenate(
                [jax.lax.dynamic_slice_in_dim(array_BT, p * size, size, axis=1) for p in pieces],
                axis=1,
            )

        return jax.tree.map(own, tree)

    def whole(self, array_Bt: Array) -> Array:
        """The array [B, T, ...] of all devices' times, in their order."""
        pieces = jax.lax.all_gather(array_Bt, self.axis, axis=1, tiled=True)
        shape = pieces.shape
        pieces = pieces.reshape(shape[0], self.shards, 2, -1, *shape[2:])
        halves = pieces[:, :, 0], pieces[:, ::-1, 1]
        return jnp.concatenate(halves, axis=1).reshape(shape)

    def order(self, time: int) -> np.ndarray:
        """int32 [T]: the times of the first device, of the second, and so on."""
        pieces = np.arange(time, dtype=np.int32).reshape(2 * self.shards, -1)
        return np.stack([pieces[: self.shards], pieces[: self.shards - 1 : -1]], 1).reshape(-1)
