"""Options of the TPU compiler, each with its reason: the only place where any are set.

They belong to the programs that train, so that nothing has to be in the environment of a run, and
that the planner compiles with what a run compiles with.
"""

import functools
import math
import os
import warnings
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, SingleDeviceSharding

_KEPT_FROM = "jax_persistent_cache_min_compile_time_secs"
_GATHERING = {
    # Parameters of what comes next travel beside work, as they do on a v5e without being told, ...
    "xla_enable_async_all_gather": True,
    # ... in pieces that ride on matrix products.
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
}
_RIDING = {
    # Where the matrix units' core runs reduce-scatters as well, they have to become fusions, also
    # those over a part of the devices, ...
    "xla_tpu_decompose_every_reduce_scatters_hlos": True,
    # ... start and end apart, ...
    "xla_enable_async_reduce_scatter_fusion": True,
    # ... and ride on the products between: a gradient travels while the next is computed.
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": True,
}
_OFFLOADED = {
    # Elsewhere another core of the chip runs them beside all that.
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
}


def _vector_memory(mib: int) -> dict[str, int]:
    """What a fusion may take of it, 16 MiB otherwise.

    About half of what a core has, the rest being for what is fetched ahead: larger tiles make
    products faster, and those on which a reduce-scatter rides do not fit without.
    """
    return {"xla_tpu_scoped_vmem_limit_kib": mib * 1024}


_OPTIONS: Mapping[str, Mapping[str, bool | int]] = {
    "TPU v5 lite": _RIDING | _vector_memory(64),
    "TPU v5": _GATHERING | _OFFLOADED | _vector_memory(40),
    "TPU v6 lite": _GATHERING | _OFFLOADED | _vector_memory(64),
}
"""By the kind of device; v5e and v6e are called lite."""


def compiler_options(mesh: Mesh) -> dict[str, bool | int]:
    """What to compile a program with that trains on a mesh; nothing but on TPUs that are known.

    An option that `LIBTPU_INIT_ARGS` names is the user's. If the installed compiler does not know
    one, none is given, with a warning.
    """
    # In a process that shares the mesh, a device of its own: the trial is its alone.
    here = jax.process_index()
    device = next((d for d in mesh.devices.flat if d.process_index == here), mesh.devices.flat[0])
    if device.platform != "tpu" or device.device_kind not in _OPTIONS:
        return {}
    users = os.environ.get("LIBTPU_INIT_ARGS", "")
    known = _OPTIONS[device.device_kind].items()
    options = {name: value for name, value in known if f"--{name}=" not in users}
    return options if _are_known(tuple(options.items()), device) else {}


@functools.cache
def _are_known(options: tuple[tuple[str, bool | int], ...], device: Any) -> bool:
    """Whether the compiler takes options; tried on a program that does nothing."""
    nothing = jax.ShapeDtypeStruct((), "float32", sharding=SingleDeviceSharding(device))
    trial = jax.jit(lambda x: x, compiler_options=dict(options)).lower(nothing)
    # Not kept on disk: of devices that are not here it could not be read again.
    before = jax.config.values[_KEPT_FROM]
    jax.config.update(_KEPT_FROM, math.inf)
    try:
        trial.compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        warnings.warn(
            f"collectives may not run beside work, the TPU compiler is another: {error}",
            stacklevel=2,
        )
        return False
    finally:
        jax.config.update(_KEPT_FROM, before)
    return True
