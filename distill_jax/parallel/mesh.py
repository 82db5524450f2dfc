"""Mesh and shardings from logical axis names."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distill_jax.artifacts import InputError

Rules = Mapping[str, tuple[str, ...]]
"""Logical axis -> the mesh axes over which it is split, the outermost first; none: it stays whole
on every device."""

RULES: Rules = {
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp", "fsdp_minor", "sequence"),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
}

ROW_AXES = ("data", "fsdp", "fsdp_minor", "sequence")
"""Mesh axes over which a batch's rows are split, where a mesh has them."""

TIME_AXIS = "sequence"
"""The one of them over which the times of a row are split instead, where rows are long."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices are arranged.

    Attributes:
      data: replicas of the model; each sees its own rows.
      fsdp: devices over which one replica's parameters and rows are split; -1 takes all that the
        others leave.
      sequence: devices that share rows in training on next tokens, where targets are written and in
        evaluation of rows that fall apart, each with a part of their times: for rows that are too
        long for one device, or too few. Parameters are split over them too. In all else they have
        rows of their own.
      tensor: devices over which heads, neurons and vocabulary are split.
      fsdp_minor: of the devices of `fsdp`, how many lie along a second axis of the mesh; a sum that
        is split over two axes of a slice in turn moves half of what it does over both at once. None
        takes the slice's own last axis.
    """

    data: int = 1
    fsdp: int = -1
    sequence: int = 1
    tensor: int = 1
    fsdp_minor: int | None = None


def make_mesh(config: MeshConfig | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with axes "data", "fsdp", "fsdp_minor", "sequence" and "tensor".

    Args:
      config: its sizes.
      devices: what it is made of, such as those of a `Topology`; None takes all that are here.

    Raises:
      InputError: the sizes do not multiply to the number of devices, or cannot lie along the axes
        of a TPU slice.
    """
    config = config or MeshConfig()
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.sequence, config.tensor]
    if sizes.count(-1) == 1 and 0 not in sizes:
        rest = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(len(devices) // rest, 1)
    data, fsdp, sequence, tensor = sizes
    minor = _minor(fsdp, devices) if config.fsdp_minor is None else config.fsdp_minor
    if any(size < 1 for size in sizes) or math.prod(sizes) != len(devices):
        raise InputError(
            f"MeshConfig(data={config.data}, fsdp={config.fsdp}, sequence={config.sequence}, "
            f"tensor={config.tensor}) does not arrange {len(devices)} devices"
        )
    if minor < 1 or fsdp % minor:
        raise InputError(f"MeshConfig: fsdp_minor={minor} does not divide fsdp={fsdp}")
    tries = [minor] if config.fsdp_minor is not None or minor == 1 else [minor, 1]
    for minor in tries:
        try:
            return _lay((data, fsdp // minor, minor, sequence, tensor), devices)
        except NotImplementedError as error:  # JAX splits an axis of a v5e alone
            refused = error
    raise InputError(
        f"a mesh of data {data}, fsdp {fsdp} with {minor} along a second axis, sequence "
        f"{sequence}, tensor {tensor} does not lie along the axes of this slice; let each be a "
        "product of some of the slice's sizes"
    ) from refused


def _lay(shape: tuple[int, ...], devices: Sequence[Any]) -> Mesh:
    """The mesh; the slices of several are replicas, between which the slow network lies.

    Raises:
      InputError: "data" is no multiple of the slices.
      NotImplementedError: JAX cannot lay it along the axes of a slice.
    """
    names = ("data", "fsdp", "fsdp_minor", "sequence", "tensor")
    auto = (jax.sharding.AxisType.Auto,) * len(names)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(shape, names, axis_types=auto, devices=devices)
    if shape[0] % slices:
        raise InputError(
            f"MeshConfig: data={shape[0]} is no multiple of the {slices} slices, each of which "
            "holds whole replicas"
        )
    inside = (shape[0] // slices, *shape[1:])
    laid = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1, 1, 1), devices)
    return Mesh(laid, names, axis_types=auto)


def _minor(fsdp: int, devices: Sequence[Any]) -> int:
    """How long the last axis of the slice is, if it is part of what `fsdp` devices can form."""
    places = [getattr(device, "coords", None) for device in devices]
    if fsdp < 1 or None in places:
        return 1
    lengths = [len(set(along)) for along in zip(*places, strict=True)]  # the same in all slices
    last = next((length for length in reversed(lengths) if length > 1), 1)
    return last if fsdp % last == 0 and fsdp > last else 1


def mesh_sizes(mesh: Mesh) -> dict[str, int]:
    """The fields of the MeshConfig that makes such a mesh of as many devices."""
    sizes = dict(mesh.shape)
    return sizes | {"fsdp": sizes.get("fsdp", 1) * sizes.get("fsdp_minor", 1)}


def row_axes(mesh: Mesh, *, split_time: bool = False) -> tuple[str, ...]:
    """The axes of a mesh over which a batch's rows are split.

    With `split_time` the devices along `TIME_AXIS` are not among them: they share rows.
    """
    names = (name for name in ROW_AXES if name in mesh.shape)
    return tuple(name for name in names if not (split_time and name == TIME_AXIS))


def row_shards(mesh: Mesh, *, split_time: bool = False) -> int:
    """Into how many parts a batch's rows are split; `split_time` as in `row_axes`."""
    return math.prod(mesh.shape[name] for name in row_axes(mesh, split_time=split_time))


def whole_batch(rows: int, mesh: Mesh | None, *, split_time: bool = False) -> int:
    """The first number of rows from `rows` on that devices share evenly; as `row_shards`."""
    shards = 1 if mesh is None else row_shards(mesh, split_time=split_time)
    return -(-rows // shards) * shards


def time_shards(mesh: Mesh) -> int:
    """Into how many parts the times of rows are split where they are."""
    return mesh.shape.get(TIME_AXIS, 1)


def shardings(mesh: Mesh, axes: Any, shapes: Any, rules: Rules = RULES) -> Any:
    """A tree of NamedShardings for a tree of arrays.

    An axis is split over as many of its mesh axes, from the first on, as divide its length: three
    KV heads stay whole on two devices.

    Args:
      mesh: where the arrays live.
      axes: tree of tuples of logical axis names.
      shapes: the same tree with arrays or ShapeDtypeStructs.
      rules: logical axis -> mesh axes.
    """

    def one(array: Any, names: tuple[str, ...]) -> NamedSharding:
        spec = [
            _dividing(mesh, size, rules[name])
            for size, name in zip(array.shape, names, strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(one, shapes, axes)


def _dividing(mesh: Mesh, size: int, names: tuple[str, ...]) -> tuple[str, ...] | str | None:
    """The longest beginning of `names` that divides `size`, without axes of one device."""
    taken: tuple[str, ...] = ()
    for name in names:
        shards = mesh.shape.get(name, 1)
        size, rest = divmod(size, shards)
        if rest:
            break
        taken += (name,) if shards > 1 else ()
    return taken if len(taken) > 1 else taken[0] if taken else None


def names_of(entry: str | Sequence[str] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec, the outermost first."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def batch_sharding(mesh: Mesh, *, split_time: bool = False) -> NamedSharding:
    """Rows split over `row_axes`; everything else of a batch whole."""
    return NamedSharding(mesh, PartitionSpec(row_axes(mesh, split_time=split_time)))
