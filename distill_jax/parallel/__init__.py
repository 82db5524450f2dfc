"""The device mesh, which axis is split over it, and the processes that share it."""

from distill_jax.parallel.ahead_of_time import OutOfMemory, compile_lowered
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
from distill_jax.parallel.topology import CHIPS, Chip, Topology

__all__ = [
    "CHIPS",
    "ROW_AXES",
    "RULES",
    "Chip",
    "LocalProcesses",
    "MeshConfig",
    "OutOfMemory",
    "ProcessError",
    "RowShare",
    "Topology",
    "barrier",
    "batch_sharding",
    "compile_lowered",
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
