"""Mesh and shardings from logical axis names."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distill_jax.artifacts import InputError

RULES: Mapping[str, str | None] = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
}
"""Logical axis -> mesh axis; None keeps the axis whole on every device."""


ROW_AXES = ("data", "fsdp")
"""Mesh axes over which a batch's rows are split."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices are arranged.

    Attributes:
      data: replicas of the model; each sees its own rows.
      fsdp: devices over which one replica's parameters and rows are split; -1 takes all that the
        other two leave.
      tensor: devices over which heads, neurons and vocabulary are split.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


def make_mesh(config: MeshConfig | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with axes "data", "fsdp" and "tensor".

    Args:
      config: its sizes.
      devices: what it is made of, such as those of a `Topology`; None takes all that are here.

    Raises:
      InputError: the sizes do not multiply to the number of devices, or cannot lie along the axes
        of a TPU slice.
    """
    config = config or MeshConfig()
    count = jax.device_count() if devices is None else len(devices)
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes.count(-1) == 1 and 0 not in sizes:
        sizes[sizes.index(-1)] = max(count // math.prod(size for size in sizes if size != -1), 1)
    if any(size < 1 for size in sizes) or math.prod(sizes) != count:
        raise InputError(
            f"MeshConfig(data={config.data}, fsdp={config.fsdp}, tensor={config.tensor}) "
            f"does not arrange {count} devices"
        )
    auto = (jax.sharding.AxisType.Auto,) * 3
    names = ("data", "fsdp", "tensor")
    try:
        return jax.make_mesh(tuple(sizes), names, axis_types=auto, devices=devices)
    except NotImplementedError as error:  # JAX splits an axis of a v5e alone
        raise InputError(
            f"a mesh of data {sizes[0]}, fsdp {sizes[1]}, tensor {sizes[2]} does not lie along the "
            "axes of this slice; let each be a product of some of the slice's sizes"
        ) from error


def shardings(mesh: Mesh, axes: Any, shapes: Any, rules: Mapping[str, str | None] = RULES) -> Any:
    """A tree of NamedShardings for a tree of arrays.

    An axis whose length the mesh axis does not divide stays whole, as three KV heads on two
    devices must.

    Args:
      mesh: where the arrays live.
      axes: tree of tuples of logical axis names.
      shapes: the same tree with arrays or ShapeDtypeStructs.
      rules: logical axis -> mesh axis.
    """

    def one(array: Any, names: tuple[str, ...]) -> NamedSharding:
        spec = []
        for size, name in zip(array.shape, names, strict=True):
            mesh_axis = rules[name]
            divides = mesh_axis is not None and size % mesh.shape[mesh_axis] == 0
            spec.append(mesh_axis if divides else None)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(one, shapes, axes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over "data" and "fsdp"; everything else of a batch whole."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES))
