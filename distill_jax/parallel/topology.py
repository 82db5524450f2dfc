"""TPU chips, and slices of them that need not be here: their devices compile, and nothing runs.

The compiler for all chips is in libtpu, which `pip install 'jax[tpu]'` brings to any machine.
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from distill_jax.artifacts import InputError

_ALONE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
}
"""Lets the library be loaded beside a program that uses a TPU, and keeps it from asking the cloud
what this machine is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Published figures of one chip.

    Attributes:
      clock: Hz; the one at which the matrix units give `flops`.
      flops: bfloat16 operations a second.
      memory_rate: bytes a second from and to HBM.
      link_rate: bytes a second over one ICI link, one way.
      ring: devices along an axis of a slice from which on its ends are joined.
      hbm: bytes that the compiler lets a program have.
      axes: of a slice, 2 or 3.
      most: the longest that each axis of a slice can be.
    """

    clock: float
    flops: float
    memory_rate: float
    link_rate: float
    ring: int
    hbm: float = math.inf
    axes: int = 2
    most: tuple[int, ...] = (16, 16)


CHIPS: Mapping[str, Chip] = {
    "v5e": Chip(
        clock=1.5e9,
        flops=197e12,
        memory_rate=819e9,
        link_rate=45e9,
        ring=16,
        hbm=15.75 * 2**30,
    ),
    "v5p": Chip(
        clock=1.75e9,
        flops=459e12,
        memory_rate=2765e9,
        link_rate=90e9,
        ring=4,
        hbm=95.74 * 2**30,
        axes=3,
        most=(16, 24, 24),
    ),
    "v6e": Chip(
        clock=1.75e9,
        flops=918e12,
        memory_rate=1640e9,
        link_rate=90e9,
        ring=16,
        hbm=31.25 * 2**30,
    ),
}
"""By name, from the Cloud TPU documentation; `hbm` from the compiler's refusals."""

_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}
"""Of devices, in either of the names that JAX knows."""


def generation_of(device: Any) -> str | None:
    """The key of `CHIPS` that a device has; None if it is another."""
    return _KINDS.get(device.device_kind) if device.platform == "tpu" else None


def least_chunk(mesh: Mesh | None) -> int:
    """From how many tokens on the fused head's gradient adds up behind its product; 0: unknown.

    Adding a chunk's share to it reads and writes 8 bytes a value, beside 2 operations a token.
    """
    generation = None if mesh is None else generation_of(mesh.devices.flat[0])
    if generation is None:
        return 0
    chip = CHIPS[generation]
    return math.ceil(8 / 2 * chip.flops / chip.memory_rate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """A slice of TPU chips.

    Attributes:
      generation: a key of `CHIPS`.
      sizes: chips along each axis.
    """

    generation: str
    sizes: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """A slice from a text such as "v5e:16x16"; the compiler is not needed.

        Raises:
          InputError: not such a text, a chip that is not known, or a slice that there is not.
        """
        found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
        if found is None:
            raise InputError(f"topology {text!r}: write chip and sizes, such as v5e:16x16")
        name, sizes = found[1], tuple(map(int, found[2].split("x")))
        if name not in CHIPS:
            raise InputError(f"topology {text}: chip {name!r} is none of {', '.join(CHIPS)}")
        chip = CHIPS[name]
        if len(sizes) != chip.axes:
            raise InputError(f"topology {text}: slices of {name} have {chip.axes} axes")
        if not all(map(_is_size, sizes)) or any(map(lambda a, b: a > b, sizes, chip.most)):
            most = "x".join(map(str, chip.most))
            raise InputError(
                f"topology {text}: sizes of {name} are 1, 2 or multiples of 4, at most {most}"
            )
        return cls(generation=name, sizes=sizes)

    def __str__(self) -> str:
        return f"{self.generation}:{'x'.join(map(str, self.sizes))}"

    @property
    def chip(self) -> Chip:
        """Its chips' figures."""
        return CHIPS[self.generation]

    @property
    def chips(self) -> int:
        """How many there are."""
        return math.prod(self.sizes)

    def larger(self) -> "Topology | None":
        """The slice of twice as many chips, its axes as even as can be; None if there is none."""
        place = min(range(len(self.sizes)), key=lambda axis: (self.sizes[axis], axis))
        sizes = list(self.sizes)
        sizes[place] *= 2
        if any(map(lambda a, b: a > b, sorted(sizes), self.chip.most)):
            return None
        return Topology(generation=self.generation, sizes=tuple(sorted(sizes)))

    def devices(self) -> list[Any]:
        """Devices that compile, as `jax.devices` gives those that run.

        Raises:
          InputError: the compiler is not installed, or does not know the slice.
        """
        if find_spec("libtpu") is None:
            raise InputError(
                f"topology {self}: the TPU compiler is not installed here; it comes with "
                "pip install 'jax[tpu]', and no TPU is needed"
            )
        for name, value in _ALONE.items():
            os.environ.setdefault(name, value)
        try:
            described = topologies.get_topology_desc(
                platform="tpu", topology_name=str(self), **self._extras()
            )
        except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
            raise InputError(f"topology {self}: {str(error).splitlines()[0]}") from error
        return list(described.devices)

    def _extras(self) -> dict[str, Any]:
        """What the compiler has to be told of the links, or it takes a mesh for a torus."""
        hosts = {"chips_per_host_bounds": (min(self.sizes[0], 2), min(self.sizes[1], 2), 1)}
        if self.chip.axes == 2:
            # The ends are joined only where the whole pod is one slice.
            joined = self.sizes == self.chip.most
            return hosts | {"wrap": (joined, joined, False)}
        joined = all(size % 4 == 0 for size in self.sizes)
        return hosts | {"wrap": (joined,) * 3, "chip_config_name": "megacore"}


def _is_size(size: int) -> bool:
    return size in (1, 2) or (size > 0 and size % 4 == 0)
