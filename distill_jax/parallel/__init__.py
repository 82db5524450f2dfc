"""The device mesh, which axis is split over it, and the processes that share it."""

from distill_jax.parallel.local import LocalProcesses, start_local
from distill_jax.parallel.mesh import (
    ROW_AXES,
    RULES,
    MeshConfig,
    batch_sharding,
    make_mesh,
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

__all__ = [
    "ROW_AXES",
    "RULES",
    "LocalProcesses",
    "MeshConfig",
    "ProcessError",
    "RowShare",
    "barrier",
    "batch_sharding",
    "count",
    "gather",
    "index",
    "is_main",
    "make_mesh",
    "on_main",
    "row_share",
    "shardings",
    "start",
    "start_local",
    "together",
]
