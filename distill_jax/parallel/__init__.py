"""The device mesh, which axis is split over it, and the processes that share it."""

from distill_jax.parallel.ahead_of_time import OutOfMemory, compile_lowered
from distill_jax.parallel.local import LocalProcesses, start_local
from distill_jax.parallel.mesh import (
    RULES,
    MeshConfig,
    batch_sharding,
    make_mesh,
    mesh_sizes,
    row_axes,
    row_shards,
    shardings,
)
from distill_jax.parallel.processes import (
    ProcessError,
    barrier,
    count,
    gather,
    index,
    is_main,
    on_main,
    start,
    together,
)
from distill_jax.parallel.rows import RowShare, row_share
from distill_jax.parallel.shares import Shares, map_rows, over_rows
from distill_jax.parallel.topology import CHIPS, Chip, Topology

__all__ = [
    "CHIPS",
    "RULES",
    "Chip",
    "LocalProcesses",
    "MeshConfig",
    "OutOfMemory",
    "ProcessError",
    "RowShare",
    "Shares",
    "Topology",
    "barrier",
    "batch_sharding",
    "compile_lowered",
    "count",
    "gather",
    "index",
    "is_main",
    "make_mesh",
    "map_rows",
    "mesh_sizes",
    "on_main",
    "over_rows",
    "row_axes",
    "row_shards",
    "row_share",
    "shardings",
    "start",
    "start_local",
    "together",
]
