"""The device mesh, which axis is split over it, and the processes that share it."""

from distill_jax.parallel.ahead_of_time import OutOfMemory, compile_lowered
from distill_jax.parallel.compiled import keep_compiled
from distill_jax.parallel.local import LocalProcesses, start_local
from distill_jax.parallel.mesh import (
    RULES,
    TIME_AXIS,
    MeshConfig,
    batch_sharding,
    make_mesh,
    mesh_sizes,
    names_of,
    row_axes,
    row_shards,
    shardings,
    time_shards,
    whole_batch,
)
from distill_jax.parallel.options import compiler_options
from distill_jax.parallel.processes import (
    EXIT_AGAIN,
    ProcessError,
    ProcessLost,
    barrier,
    count,
    gather,
    index,
    is_main,
    on_main,
    together,
)
from distill_jax.parallel.rows import RowShare, row_share, to_host
from distill_jax.parallel.shares import Shares, map_rows, over_rows
from distill_jax.parallel.startup import start
from distill_jax.parallel.stopping import (
    Preempted,
    deferring,
    preempted,
    stop_if_preempted,
    stoppable,
)
from distill_jax.parallel.topology import CHIPS, Chip, Topology, least_chunk
from distill_jax.parallel.watch import at, looping

__all__ = [
    "CHIPS",
    "EXIT_AGAIN",
    "RULES",
    "TIME_AXIS",
    "Chip",
    "LocalProcesses",
    "MeshConfig",
    "OutOfMemory",
    "Preempted",
    "ProcessError",
    "ProcessLost",
    "RowShare",
    "Shares",
    "Topology",
    "at",
    "barrier",
    "batch_sharding",
    "compile_lowered",
    "compiler_options",
    "count",
    "deferring",
    "gather",
    "index",
    "is_main",
    "keep_compiled",
    "least_chunk",
    "looping",
    "make_mesh",
    "map_rows",
    "mesh_sizes",
    "names_of",
    "on_main",
    "over_rows",
    "preempted",
    "row_axes",
    "row_shards",
    "row_share",
    "shardings",
    "start",
    "start_local",
    "stop_if_preempted",
    "stoppable",
    "time_shards",
    "to_host",
    "together",
    "whole_batch",
]
