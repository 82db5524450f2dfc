"""What a program compiled for a TPU would take, read off its text: nothing is executed.

The compiler prints `estimated_cycles` on most instructions. Their sum, weighed with how often each
runs, is a model of the time and not a measurement of it; `Cost.assumptions` says what it rests on.
"""

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Published figures of one chip.

    Attributes:
      clock: Hz; the one at which the matrix units give `flops`.
      flops: bfloat16 operations a second.
      memory_rate: bytes a second from and to HBM.
      link_rate: bytes a second over one ICI link, one way.
      ring: devices along an axis of a slice from which on its ends are joined.
    """

    clock: float
    flops: float
    memory_rate: float
    link_rate: float
    ring: int


CHIPS: Mapping[str, Chip] = {
    "v5e": Chip(clock=1.5e9, flops=197e12, memory_rate=819e9, link_rate=45e9, ring=16),
    "v5p": Chip(clock=1.75e9, flops=459e12, memory_rate=2765e9, link_rate=90e9, ring=4),
    "v6e": Chip(clock=1.75e9, flops=918e12, memory_rate=1640e9, link_rate=90e9, ring=16),
}
"""By name, from the Cloud TPU documentation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Modelled cost of one execution on one chip.

    Attributes:
      hbm_bytes: arguments + temporaries + outputs - aliased; None if only a text was given. The
        temporaries count what a loop's body holds twice, so this is on the safe side.
      peak_bytes: the compiler's own peak, the one that it refuses programs by; None likewise.
      compute_seconds: instructions with an estimate.
      collective_seconds: synchronous collectives.
      kernel_seconds: Pallas calls that state their operations.
      hidden_seconds: asynchronous collectives; not in `seconds`.
      unpriced_seconds: what moving the operands and results of instructions without an estimate
        takes at least (gathers, scatters and sorts left out); not in `seconds`.
      unpriced: how often instructions without an estimate run, by opcode.
      assumptions: to be shown beside the figures.
    """

    hbm_bytes: int | None
    peak_bytes: int | None
    compute_seconds: float
    collective_seconds: float
    kernel_seconds: float
    hidden_seconds: float
    unpriced_seconds: float
    unpriced: dict[str, int]
    assumptions: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Compute, synchronous collectives and kernels, one after the other."""
        return self.compute_seconds + self.collective_seconds + self.kernel_seconds


def estimate(compiled: Any, chip: Chip, *, kernel_share: float = 0.5) -> Cost:
    """The cost of a compiled executable, or of its text (then without memory).

    Args:
      compiled: `jax.stages.Compiled` for a TPU, or what its `as_text()` gives.
      chip: what it would run on.
      kernel_share: share of `chip.flops` that Pallas calls are taken to reach.

    Raises:
      ValueError: no program in the text, or a loop whose number of turns cannot be read.
    """
    stats = None if isinstance(compiled, str) else compiled.memory_analysis()
    seconds: defaultdict[str, float] = defaultdict(float)
    unpriced: Counter[str] = Counter()
    started = set()
    program = _Program(compiled if isinstance(compiled, str) else compiled.as_text())
    for op, runs, around in program.executed():
        collective, scattered = program.collective(op)
        if collective:
            hidden = "-start" in op.opcode or "async_collective" in op.name
            key = (_number(r"channel_id=(\d+)", collective.rest), collective.type)
            if not hidden or key not in started:
                kind = "hidden" if hidden else "collective"
                seconds[kind] += runs * _wire(collective, scattered, chip)
            started |= {key} if hidden else set()
        elif cycles := _number(r'"estimated_cycles":"(\d+)"', op.rest):
            seconds["compute"] += runs * cycles / chip.clock
        elif _KERNEL in op.rest and (flops := _number(r'"flops":"?(\d+)', op.rest)):
            seconds["kernel"] += runs * flops / (kernel_share * chip.flops)
        elif not (op.is_free or "[]" in op.type):
            unpriced[op.kind] += runs
            if op.kind not in _IRREGULAR:
                types = [op.type, *(around[name].type for name in op.operands if name in around)]
                seconds["unpriced"] += runs * sum(map(_hbm_bytes, types)) / chip.memory_rate
    return Cost(
        hbm_bytes=memory_bytes(stats) if stats else None,
        peak_bytes=stats.peak_memory_in_bytes if stats else None,
        compute_seconds=seconds["compute"],
        collective_seconds=seconds["collective"],
        kernel_seconds=seconds["kernel"],
        hidden_seconds=seconds["hidden"],
        unpriced_seconds=seconds["unpriced"],
        unpriced=dict(unpriced),
        assumptions=(
            "modelled from the compiler's estimates: nothing was executed",
            f"clock {chip.clock / 1e9:g} GHz, HBM {chip.memory_rate / 1e9:g} GB/s",
            f"ICI {chip.link_rate / 1e9:g} GB/s a link and way; a group of up to 16 devices lies "
            f"along one axis of the slice, a ring from {chip.ring} on; a larger one along two",
            "asynchronous collectives and copies cost nothing, of a conditional all branches count",
            f"Pallas calls reach {kernel_share:.0%} of {chip.flops / 1e12:g} TFLOP/s",
        ),
    )


def memory_bytes(stats: Any) -> int:
    """Bytes a chip by a `memory_analysis()`: arguments + temporaries + outputs - aliased."""
    held = stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.output_size_in_bytes
    return held - stats.alias_size_in_bytes


def largest_gathered(text: str) -> float:
    """Bytes of the largest array that all-gathers or all-reduces of compiled HLO make whole."""
    kinds = ("all-gather", "all-reduce")
    return max(
        (
            size
            for computation in _Program(text).computations.values()
            for op in computation.values()
            if op.opcode.removesuffix("-start") in kinds
            for size, _ in _sizes(op.type)
        ),
        default=0.0,
    )


_KERNEL = 'custom_call_target="tpu_custom_call"'
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"}
_FREE |= {"call", "partition-id", "replica-id", "after-all", "custom-call"}
_IRREGULAR = {"gather", "scatter", "sort", "dynamic-update-slice", "kernel"}
_COLLECTIVES = {"all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"}
_BYTES = {"pred": 1.0, "s4": 0.5, "u4": 0.5}  # all others name their bits


@dataclasses.dataclass(frozen=True)
class _Op:
    name: str
    type: str
    opcode: str
    rest: str  # operands, attributes, metadata

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest[: self.rest.find(")")])

    @property
    def kind(self) -> str:
        if _KERNEL in self.rest:
            return "kernel"
        return re.split(r"_fusion|\.", self.name)[0] if self.opcode == "fusion" else self.opcode

    @property
    def is_free(self) -> bool:
        asynchronous = self.opcode.endswith(("-start", "-update", "-done"))
        return asynchronous or (self.opcode in _FREE and self.kind != "kernel")

    def attribute(self, key: str) -> str:
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""


_Computation = dict[str, _Op]


class _Program:
    """The computations of an HLO module by name."""

    def __init__(self, text: str):
        self.computations: dict[str, _Computation] = {}
        self.entry = ""
        current: _Computation = {}
        last = None
        for line in text.splitlines():
            if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                current = self.computations.setdefault(header[2], {})
                self.entry = header[2] if header[1] else self.entry
                last = None
            elif op := _parse(line):
                last = current[op.name] = op
            elif last:  # some kernels put newlines into their metadata
                last = current[last.name] = dataclasses.replace(last, rest=f"{last.rest}\n{line}")
        if not self.entry:
            raise ValueError("the text has no ENTRY computation: is it compiled HLO?")

    def executed(self, name: str = "", runs: int = 1) -> Iterator[tuple[_Op, int, _Computation]]:
        """Every instruction outside fusions, how often it runs, and what stands around it."""
        around = self.computations[name or self.entry]
        for op in around.values():
            yield op, runs, around
            inner = []
            if op.opcode == "while":
                inner = [(op.attribute("body"), runs * self._turns(op, around))]
            elif op.opcode == "call":
                inner = [(op.attribute("to_apply"), runs)]
            elif op.opcode == "conditional":
                listed = re.search(r"branch_computations=\{([^}]*)\}", op.rest)
                pattern = r"%([\w.\-]+)" if listed else r"_computation=%([\w.\-]+)"
                branches = re.findall(pattern, listed[1] if listed else op.rest)
                inner = [(branch, runs) for branch in branches]
            for computation, times in inner:
                yield from self.executed(computation, times)

    def collective(self, op: _Op) -> tuple[_Op | None, bool]:
        """The collective that an instruction is or wraps; whether it keeps a share of the sum."""
        if op.opcode.removesuffix("-start") in _COLLECTIVES:
            return op, False
        if op.opcode in ("fusion", "async-start"):
            for part in self.computations.get(op.attribute("calls"), {}).values():
                found, _ = self.collective(part)
                if found:
                    return found, "all-reduce-scatter" in op.attribute("calls")
        return None, False

    def _turns(self, loop: _Op, around: _Computation) -> int:
        condition = self.computations[loop.attribute("condition")]
        for op in condition.values():
            if op.opcode == "compare" and "direction=LT" in op.rest:
                first, bound = (_scalar(name, condition, loop, around) for name in op.operands)
                if first is not None and bound is not None:
                    return max(bound - first, 0)  # all loops that JAX makes count up by one
        raise ValueError(f"cannot read how often the loop {loop.name} turns")


def _scalar(name: str, inside: _Computation, loop: _Op, around: _Computation) -> int | None:
    """A scalar's value before a loop's first turn, looked up through tuples and copies."""
    op = inside.get(name)
    if op is None:
        return None
    if op.opcode == "constant":
        return _number(r"^(-?\d+)\)", op.rest)
    if op.opcode in ("copy", "bitcast"):
        return _scalar(op.operands[0], inside, loop, around)
    start = around.get(loop.operands[0])
    if op.opcode == "get-tuple-element" and inside is not around and start is not None:
        index = _number(r"index=(\d+)", op.rest) or 0
        return _scalar(start.operands[index], around, loop, around)
    return None


def _parse(line: str) -> _Op | None:
    found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", line)
    if not found:
        return None
    name, text = found.groups()
    depth = 0
    for end, letter in enumerate(text):
        depth += (letter in "({") - (letter in ")}")
        if letter == " " and depth == 0:  # a type has spaces only between the parts of a tuple
            call = re.match(r"([\w\-]+)\((.*)$", text[end + 1 :])
            return _Op(name, text[:end], call[1], call[2]) if call else None
    return None


def _number(pattern: str, text: str) -> int | None:
    found = re.search(pattern, text)
    return int(found[1]) if found else None


def _sizes(type_: str) -> Iterator[tuple[float, str]]:
    """Bytes and layout of each array of a type."""
    for dtype, shape, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", type_):
        bits = _number(r"^[a-z]+(\d+)", dtype)
        size = _BYTES.get(dtype, bits / 8 if bits else 0.0)
        yield size * math.prod(int(length) for length in shape.split(",") if length), layout


def _hbm_bytes(type_: str) -> float:
    return sum(size for size, layout in _sizes(type_) if not re.search(r"S\(\d+\)", layout))


def _wire(op: _Op, scattered: bool, chip: Chip) -> float:
    """Seconds of a collective on the links."""
    sizes = [size for size, _ in _sizes(op.type)]
    size = max(sizes) if "-start" in op.opcode else sum(sizes)
    kind = op.opcode.removesuffix("-start")
    if kind == "collective-permute":
        return size / chip.link_rate
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", op.rest)
    group = len(listed[1].split(",")) if listed else _number(r"groups=\[\d+,(\d+)\]", op.rest) or 1
    passes = {"reduce-scatter": group, "all-reduce": 1 if scattered else 2, "all-to-all": 0.25}
    links = (1 if group <= 16 else 2) * (2 if group >= chip.ring else 1)
    return passes.get(kind, 1) * size * (group - 1) / group / (links * chip.link_rate)
