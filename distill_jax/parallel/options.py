"""Options of the TPU compiler, each with its reason: the only place where any are set.

They belong to the step that trains, so that nothing has to be in the environment of a run, and that
the planner compiles it with what a run compiles it with.
"""

import functools
import math
import os
import re
import warnings
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, SingleDeviceSharding

from distill_jax.parallel.topology import generation_of

_KEPT_FROM = "jax_persistent_cache_min_compile_time_secs"
_RIDING = {
    # Where the TensorCore runs reduce-scatters as well, they have to become fusions, also those
    # over a part of the devices, ...
    "xla_tpu_decompose_every_reduce_scatters_hlos": True,
    # ... start and end apart, ...
    "xla_enable_async_reduce_scatter_fusion": True,
    # ... and ride on the products between: a gradient travels while the next is computed.
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": True,
}
_OFFLOADED = {
    # Elsewhere the chip's SparseCores run them beside all that, ...
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    # ... and gathers too, also those over an axis of the mesh that takes two of the slice, ...
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True,
    # ... which may then not ride on products.
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": False,
}


def _vector_memory(mib: int) -> dict[str, int]:
    """The scoped VMEM, which a fusion or a kernel may take; the compiler's own limit is far less.

    The rest of it is for what is fetched ahead. Larger tiles make products faster, and those on
    which a reduce-scatter rides do not fit without.
    """
    return {"xla_tpu_scoped_vmem_limit_kib": mib * 1024}


# Collectives do not ride on products but on v5e: libtpu 0.0.50 refuses that elsewhere, as it may
# give wrong results.
_OPTIONS: Mapping[str, Mapping[str, bool | int]] = {
    "v5e": _RIDING | _vector_memory(64),
    "v5p": _OFFLOADED | _vector_memory(40),
    "v6e": _OFFLOADED | _vector_memory(64),
}


def compiler_options(mesh: Mesh) -> dict[str, bool | int]:
    """What to compile a program with that trains on a mesh; empty but on v5e, v5p and v6e.

    An option that `LIBTPU_INIT_ARGS` names is the user's, the others stay. If the installed
    compiler refuses one, none is given, with a warning.
    """
    # In a process that shares the mesh, a device of its own: the trial is its alone.
    here = jax.process_index()
    device = next((d for d in mesh.devices.flat if d.process_index == here), mesh.devices.flat[0])
    generation = generation_of(device)
    if generation is None:
        return {}
    users = os.environ.get("LIBTPU_INIT_ARGS", "")
    known = _OPTIONS[generation].items()
    options = {n: value for n, value in known if not re.search(rf"-(no)?{n}(=|\s|$)", users)}
    return options if _are_accepted(tuple(options.items()), device) else {}


@functools.cache
def _are_accepted(options: tuple[tuple[str, bool | int], ...], device: Any) -> bool:
    """Whether the compiler takes options; tried on a program that does nothing."""
    nothing = jax.ShapeDtypeStruct((), "float32", sharding=SingleDeviceSharding(device))
    trial = jax.jit(lambda x: x, compiler_options=dict(options)).lower(nothing)
    # Not kept on disk: of devices that are not here it could not be read again.
    before = jax.config.values[_KEPT_FROM]
    jax.config.update(_KEPT_FROM, math.inf)
    try:
        trial.compile()
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        warnings.warn(
            f"collectives may not run beside work, this libtpu is not the one for it: {reason}",
            stacklevel=3,
        )
        return False
    finally:
        jax.config.update(_KEPT_FROM, before)
    return True
