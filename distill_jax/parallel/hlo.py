"""Reads the text of a compiled program: its instructions, and how often each runs."""

import dataclasses
import math
import re
from collections.abc import Iterator

KERNEL = 'custom_call_target="tpu_custom_call"'
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"}
_FREE |= {"call", "partition-id", "replica-id", "after-all", "custom-call"}
_COLLECTIVES = {"all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"}
_BYTES = {"pred": 1.0, "s4": 0.5, "u4": 0.5}  # all others name their bits


@dataclasses.dataclass(frozen=True)
class Op:
    """One instruction: `name = type opcode(rest`, in which stand operands and metadata."""

    name: str
    type: str
    opcode: str
    rest: str
    is_root: bool = False

    @property
    def operands(self) -> list[str]:
        """Names of the instructions that it reads."""
        return re.findall(r"%([\w.\-]+)", self.rest[: self.rest.find(")")])

    @property
    def kind(self) -> str:
        """What it does; of a fusion, what the compiler named it after."""
        if KERNEL in self.rest:
            return "kernel"
        return re.split(r"_fusion|\.", self.name)[0] if self.opcode == "fusion" else self.opcode

    @property
    def is_free(self) -> bool:
        """Whether it takes no time of its own."""
        asynchronous = self.opcode.endswith(("-start", "-update", "-done"))
        return asynchronous or (self.opcode in _FREE and self.kind != "kernel")

    @property
    def scope(self) -> str:
        """The path of JAX's transformations and named scopes that it comes from; may be empty."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def group(self) -> int:
        """Devices that take part together in a collective, in any of the three ways to say it."""
        if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", self.rest):
            return len(listed[1].split(","))
        if named := re.search(r"replica_groups=mesh\[(.*?)\].*?\{('[^}]*)\}", self.rest):
            sizes = dict(re.findall(r"('\w+')=(\d+)", named[1]))
            return math.prod(int(sizes[axis]) for axis in named[2].split(","))
        return number(r"groups=\[\d+,(\d+)\]", self.rest) or 1

    @property
    def is_asynchronous(self) -> bool:
        """Whether a collective that it is or wraps goes on beside other work."""
        names = self.name, self.attribute("calls")
        return "-start" in self.opcode or any(
            name.startswith(("async_collective", "async-collective")) for name in names
        )

    def attribute(self, key: str) -> str:
        """The word behind `key=`, or an empty text."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""


Computation = dict[str, Op]


class Program:
    """The computations of an HLO module by name."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current: Computation = {}
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

    def executed(
        self, name: str = "", runs: int = 1, *, turns: int | None = None
    ) -> Iterator[tuple[Op, int, Computation]]:
        """Every instruction outside fusions, how often it runs, and what stands around it.

        Args:
          name: of a computation; empty: the entry.
          runs: how often it runs.
          turns: of a loop whose end cannot be read.

        Raises:
          ValueError: there is such a loop, and no `turns`.
        """
        around = self.computations[name or self.entry]
        for op in around.values():
            yield op, runs, around
            times = runs * self._turns(op, around, turns) if op.opcode == "while" else runs
            for computation in called(op):
                yield from self.executed(computation, times, turns=turns)

    def collective(self, op: Op) -> tuple[Op | None, bool]:
        """The collective that an instruction is or wraps; whether it keeps a share of the sum."""
        if op.opcode.removesuffix("-start") in _COLLECTIVES:
            return op, False
        if op.opcode in ("fusion", "async-start", "call-start"):
            # A call that starts is one for a SparseCore.
            inner = op.attribute("to_apply" if op.opcode == "call-start" else "calls")
            for part in self.computations.get(inner, {}).values():
                found, scattered = self.collective(part)
                if found:
                    return found, scattered or "all-reduce-scatter" in inner
        return None, False

    def _turns(self, loop: Op, around: Computation, otherwise: int | None) -> int:
        condition = self.computations[loop.attribute("condition")]
        for op in condition.values():
            if op.opcode == "compare" and "direction=LT" in op.rest:
                first, bound = (_scalar(name, condition, loop, around) for name in op.operands)
                if first is not None and bound is not None:
                    return max(bound - first, 0)  # all loops that JAX makes count up by one
        if otherwise is not None:
            return otherwise
        raise ValueError(f"cannot read how often the loop {loop.name} turns")


def called(op: Op) -> list[str]:
    """The computations that an instruction runs, but for those fused into it."""
    if op.opcode == "while":
        return [op.attribute("body")]
    if op.opcode == "call":
        return [op.attribute("to_apply")]
    if op.opcode != "conditional":
        return []
    listed = re.search(r"branch_computations=\{([^}]*)\}", op.rest)
    pattern = r"%([\w.\-]+)" if listed else r"_computation=%([\w.\-]+)"
    return re.findall(pattern, listed[1] if listed else op.rest)


def parts(type_: str) -> list[str]:
    """The types that a tuple's type is made of; another type alone."""
    if not type_.startswith("("):
        return [type_]
    found, depth, start = [], 0, 1
    for place, letter in enumerate(type_):
        depth += (letter in "({[") - (letter in ")}]")
        if depth == 0 or (depth == 1 and letter == ","):
            found.append(re.sub(r"/\*.*?\*/", "", type_[start:place]).strip())
            start = place + 1
        if depth == 0:
            break
    return [part for part in found if part]


def leaves(type_: str) -> list[str]:
    """The types of all arrays of a type."""
    found = parts(type_)
    return found if found == [type_] else [leaf for part in found for leaf in leaves(part)]


def _scalar(name: str, inside: Computation, loop: Op, around: Computation) -> int | None:
    """A scalar's value before a loop's first turn, looked up through tuples and copies."""
    op = inside.get(name)
    if op is None:
        return None
    if op.opcode == "constant":
        return number(r"^(-?\d+)\)", op.rest)
    if op.opcode in ("copy", "bitcast"):
        return _scalar(op.operands[0], inside, loop, around)
    start = around.get(loop.operands[0])
    if op.opcode == "get-tuple-element" and inside is not around and start is not None:
        index = number(r"index=(\d+)", op.rest) or 0
        return _scalar(start.operands[index], around, loop, around)
    return None


def _parse(line: str) -> Op | None:
    found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$", line)
    if not found:
        return None
    root, name, text = found.groups()
    depth = 0
    for end, letter in enumerate(text):
        depth += (letter in "({") - (letter in ")}")
        if letter == " " and depth == 0:  # a type has spaces only between the parts of a tuple
            call = re.match(r"([\w\-]+)\((.*)$", text[end + 1 :])
            return Op(name, text[:end], call[1], call[2], bool(root)) if call else None
    return None


def number(pattern: str, text: str) -> int | None:
    """The pattern's group as a number, if it is found."""
    found = re.search(pattern, text)
    return int(found[1]) if found else None


def sizes(type_: str) -> Iterator[tuple[float, str]]:
    """Bytes and layout of each array of a type."""
    for dtype, shape, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", type_):
        lengths = (int(length) for length in shape.split(",") if length)
        yield element_bytes(dtype) * math.prod(lengths), layout


def element_bytes(dtype: str) -> float:
    """Bytes of an element of such a type; 0 for tokens and the like."""
    bits = number(r"^[a-z]+(\d+)", dtype)
    return _BYTES.get(dtype, bits / 8 if bits else 0.0)


def hbm_bytes(type_: str) -> float:
    """Bytes of a type's arrays that lie in HBM."""
    return sum(size for size, layout in sizes(type_) if not re.search(r"S\(\d+\)", layout))
