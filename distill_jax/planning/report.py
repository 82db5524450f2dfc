"""What a program would take on a slice, and what that makes of the whole stage."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from distill_jax.parallel import OutOfMemory, Topology, liveness, mesh_sizes, tpu_cost
from distill_jax.planning.program import PARTS, Program

HARDWARE = (
    "Only hardware can show: the real step time (clocks, HBM contention, how far collectives "
    "really hide), numerics, the input pipeline, checkpoints and restarts, and whether a slice of "
    "this size is to be had."
)
"""What no figure here says; to be shown beside them."""

_HEAVIEST = 12
_SECONDS_A_DAY = 86400.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """One program compiled for one slice. Bytes and seconds are a chip's.

    Attributes:
      program: the stage, and which of its programs.
      topology: the slice.
      mesh: devices along each axis.
      chips: how many there are.
      batch: rows at a time on each of the devices over which they are split.
      rows: of a batch of all devices.
      remat: what the backward pass recomputes.
      fits: whether the compiler found room for it.
      hbm: bytes needed: arguments + temporaries + outputs - aliased, and what waits beside; of what
        does not fit by itself, what the compiler's refusal says; None if it crashed.
      problem: why it does not fit, in a line.
      peak: the compiler's own peak, which it refuses programs by, and what waits beside; None if it
        did refuse.
      available: bytes that a program may have.
      memory: bytes by part. "temporaries" are activations, gradients, gathered parameters and what
        the loss needs, with the gaps between them.
      alive: bytes by named scope of the temporaries that are alive at once when most are, read off
        the compiled text (`parallel.liveness`); with the arguments they come to about `peak`.
      largest: the largest of these arrays, or, of what does not fit, those that the compiler's
        refusal lists: [bytes, what and where from].
      flops: of one step by formula, of all chips: 6 a parameter and token and causal attention
        (a forward pass alone, such as a live teacher's: 2), nothing counted twice.
      tokens: of one step, of all chips.
      total_tokens: of the stage in the recipe; None if it does not say.
      step: modelled seconds of a step; the next four are its parts.
      compute: seconds of instructions that the compiler prices.
      kernels: seconds of Pallas calls.
      waited: seconds of collectives that the chip waits for.
      hidden: seconds of collectives beside its work.
      unpriced: least seconds of instructions without a price; not in `step`.
      mfu: flops / (step * peak of all chips).
      collectives: by kind: "count", "bytes" sent by a chip, "seconds" on the links, and
        "waits", the part of these in which the chip has nothing else to do.
      parts: seconds by named scope; "other" in none.
      heaviest: the instructions that take most: "name", "kind", "runs", "seconds",
        "waits", "scope" and "detail".
      travels: the collectives that take most of the links' time, beside work or not, in the same
        words.
      assumptions: what all that rests on.
    """

    program: str
    topology: str
    mesh: Mapping[str, int]
    chips: int
    batch: int
    rows: int
    remat: str
    fits: bool
    hbm: float | None
    problem: str = ""
    peak: float | None
    available: float
    memory: Mapping[str, float]
    alive: Mapping[str, float] = dataclasses.field(default_factory=dict)
    largest: Sequence[Sequence[Any]] = ()
    flops: float
    tokens: int
    total_tokens: float | None
    step: float | None = None
    compute: float = 0.0
    kernels: float = 0.0
    waited: float = 0.0
    hidden: float = 0.0
    unpriced: float = 0.0
    mfu: float | None = None
    collectives: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    heaviest: Sequence[Mapping[str, Any]] = ()
    travels: Sequence[Mapping[str, Any]] = ()
    assumptions: Sequence[str] = ()

    @property
    def tokens_per_second(self) -> float | None:
        """Of a chip."""
        return None if not (self.step and self.tokens) else self.tokens / self.step / self.chips

    @property
    def days(self) -> float | None:
        """Of the whole stage, steps alone."""
        speed = self.tokens_per_second
        if speed is None or self.total_tokens is None:
            return None
        return self.total_tokens / (speed * self.chips) / _SECONDS_A_DAY

    @property
    def chip_hours(self) -> float | None:
        """Of the whole stage, steps alone."""
        return None if self.days is None else self.days * 24 * self.chips

    def line(self, price: float | None) -> dict[str, Any]:
        """What `--json` prints of it: GB are 10^9 bytes.

        Args:
          price: dollars a chip and hour.
        """
        hours = self.chip_hours
        return {
            "program": self.program,
            "topology": self.topology,
            "mesh": dict(self.mesh),
            "batch": self.batch,
            "rows": self.rows,
            "remat": self.remat,
            "fits": self.fits,
            "problem": self.problem,
            "hbm_gb": None if self.hbm is None else self.hbm / 1e9,
            "hbm_peak_gb": None if self.peak is None else self.peak / 1e9,
            "hbm_available_gb": self.available / 1e9,
            "hbm_parts_gb": {name: size / 1e9 for name, size in self.memory.items()},
            "hbm_alive_gb": {name: size / 1e9 for name, size in self.alive.items()},
            "flops": self.flops,
            "step_s": self.step,
            "step_parts_s": {
                "compute": self.compute,
                "kernels": self.kernels,
                "collectives": self.waited,
                "hidden_collectives": self.hidden,
                "unpriced": self.unpriced,
            },
            "scopes_s": dict(self.parts),
            "mfu": self.mfu,
            "tokens_per_s_chip": self.tokens_per_second,
            "days": self.days,
            "chip_hours": hours,
            "dollars": None if price is None or hours is None else price * hours,
            "collectives": {kind: dict(found) for kind, found in self.collectives.items()},
            "heaviest": [dict(one) for one in self.heaviest],
            "travels": [dict(one) for one in self.travels],
            "largest": [list(one) for one in self.largest],
            "assumptions": [*self.assumptions, HARDWARE],
        }

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `Report(**value)` reads back."""
        return dataclasses.asdict(self)


def make_report(program: Program, topology: Topology, compiled: Any) -> Report:
    """The report of a compiled program.

    Args:
      program: what was compiled.
      topology: for what.
      compiled: its executable, or the refusal.
    """
    shared = _shared(program, topology)
    arguments = shared.pop("memory")
    if isinstance(compiled, OutOfMemory):
        return Report(
            fits=False,
            hbm=compiled.needed,
            problem=str(compiled),
            peak=None,
            memory=arguments,
            largest=compiled.largest,
            assumptions=program.notes,
            **shared | {"available": compiled.available},
        )
    stats = compiled.memory_analysis()
    used = used_bytes(compiled)
    beside = max(sum(arguments.values()) - used, 0.0)
    peak = stats.peak_memory_in_bytes + beside
    known = {
        "fits": peak <= shared["available"],
        "hbm": tpu_cost.memory_bytes(stats) + beside,
        "problem": "" if peak <= shared["available"] else _too_much(peak, beside, shared),
        "peak": peak,
        "memory": memory_parts(arguments, used, stats),
        **shared,
    }
    try:
        cost = tpu_cost.estimate(
            compiled,
            topology.chip,
            parts=PARTS,
            heaviest=_HEAVIEST,
            turns=program.turns,
        )
        alive = liveness.at_peak(compiled.as_text())
    except (LookupError, ValueError) as error:  # another compiler may write what nobody has seen
        note = f"its time is not modelled, for the compiled text could not be read ({error})"
        return Report(assumptions=(*program.notes, note), **known)
    return Report(
        alive=by_part(alive),
        largest=_grouped(alive)[:_HEAVIEST],
        step=cost.seconds,
        compute=cost.compute_seconds,
        kernels=cost.kernel_seconds,
        waited=cost.collective_seconds,
        hidden=cost.hidden_seconds,
        unpriced=cost.unpriced_seconds,
        mfu=program.flops / (cost.seconds * topology.chips * topology.chip.flops)
        if cost.seconds
        else None,
        collectives={kind: dataclasses.asdict(one) for kind, one in cost.collectives.items()},
        parts={name or "other": seconds for name, seconds in cost.parts.items()},
        heaviest=list(map(_described, cost.heaviest)),
        travels=list(map(_described, cost.largest)),
        assumptions=(*program.notes, *cost.assumptions, *_silent_kernels(cost)),
        **known,
    )


def _silent_kernels(cost: tpu_cost.Cost) -> tuple[str, ...]:
    count = cost.unpriced.get("kernel", 0)
    if not count:
        return ()
    return (
        f"{count} Pallas calls do not say what they do: they cost nothing here, and time there",
    )


def crashed_report(program: Program, topology: Topology, problem: str) -> Report:
    """The report of a program over which the compiler crashed: whether it fits is not known."""
    return Report(
        fits=False,
        hbm=None,
        problem=problem,
        peak=None,
        assumptions=program.notes,
        **_shared(program, topology),
    )


def _shared(program: Program, topology: Topology) -> dict[str, Any]:
    """What is known without compiling."""
    return {
        "program": program.name,
        "topology": str(topology),
        "mesh": mesh_sizes(program.mesh),
        "chips": topology.chips,
        "batch": program.batch,
        "rows": program.rows,
        "remat": program.remat,
        "available": topology.chip.hbm,
        "memory": {name: shard_bytes(tree) for name, tree in program.held.items()},
        "flops": program.flops,
        "tokens": program.tokens,
        "total_tokens": program.total_tokens,
    }


def _grouped(arrays: Sequence[liveness.Array]) -> list[tuple[float, str]]:
    """Bytes of arrays of one type and place, the largest first, and what they are."""
    sizes: dict[tuple[str, str], list[float]] = {}
    for array in arrays:
        sizes.setdefault((array.type, array.scope), []).append(array.bytes)
    described = [
        (sum(found), f"{f'{len(found)}x' if len(found) > 1 else ''}{type_} {scope}")
        for (type_, scope), found in sizes.items()
    ]
    return sorted(described, key=lambda one: -one[0])


def by_part(arrays: Sequence[liveness.Array]) -> dict[str, float]:
    """Bytes by named scope, the largest first."""
    sums: dict[str, float] = {}
    for array in arrays:
        part = tpu_cost.innermost(array.scope, PARTS) or "other"
        sums[part] = sums.get(part, 0.0) + array.bytes
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def _described(one: tpu_cost.Priced) -> dict[str, Any]:
    names = ("name", "kind", "runs", "seconds", "waits", "scope", "detail")
    return {name: getattr(one, name) for name in names}


def _too_much(peak: float, beside: float, shared: Mapping[str, Any]) -> str:
    return (
        f"it needs {peak / 1e9:.2f} GB of HBM a chip, {beside / 1e9:.2f} of them for what waits "
        f"beside it, there are {shared['available'] / 1e9:.2f}"
    )


def memory_parts(held: Mapping[str, float], used: float, stats: Any) -> dict[str, float]:
    """Bytes by part: of what is held, and of `memory_analysis()` what comes on top.

    What arguments take beyond their values is the padding of their layouts.

    Args:
      held: bytes of what devices hold, arguments and what waits beside them.
      used: those of them that the program uses.
      stats: of the compiled program.
    """
    parts = {
        **held,
        "padding": max(stats.argument_size_in_bytes - used, 0.0),
        "temporaries": float(stats.temp_size_in_bytes),
        "results": float(stats.output_size_in_bytes - stats.alias_size_in_bytes),
    }
    return {name: size for name, size in parts.items() if size}


def used_bytes(compiled: Any) -> float:
    """Bytes on one device of the arguments that a program uses: `jit` drops the others."""
    arguments = jax.tree.leaves(compiled.args_info)
    places = jax.tree.leaves(compiled.input_shardings, is_leaf=lambda place: place is None)
    return float(
        sum(
            math.prod(place.shard_shape(argument.shape)) * argument.dtype.itemsize
            for argument, place in zip(arguments, places, strict=True)
            if place is not None
        )
    )


def shard_bytes(tree: Any) -> float:
    """Bytes that one device holds of a tree of ShapeDtypeStructs with shardings."""
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )
    )
