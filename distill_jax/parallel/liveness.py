"""Which arrays lie in HBM at once, read off the text of a scheduled program.

The compiler says how much its temporaries take and not what they are. Instructions stand in the
order in which they run, so an array lives from the one that makes it to the last that reads it.
What shares memory is as the text says (aliases, tuples, loops' carries, results in the memory of
donated arguments), and an elementwise result takes the place of an operand that it is the last to
read. Where in HBM the arrays lie, and hence the gaps between them, is not modelled.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Sequence

from distill_jax.parallel import hlo


@dataclasses.dataclass(frozen=True)
class Array:
    """An array that lives when most memory is used.

    Attributes:
      bytes: that it takes, padding included.
      type: its element type and shape.
      scope: where in the program it comes from, or the instruction that makes it.
    """

    bytes: float
    type: str
    scope: str


def at_peak(text: str) -> list[Array]:
    """The temporary arrays that live in HBM when most is used, the largest first.

    Args:
      text: of a compiled program. Its arguments, and results in their memory, are left out.
    """
    program = hlo.Program(text)
    header = text[: text.find("entry_computation_layout")]
    donated = {int(index) for index in re.findall(r"\{(\d+)\}: \(\d+", header)}
    return sorted(_peak(program, program.entry, donated), key=lambda array: -array.bytes)


def padded_bytes(type_: str) -> float:
    """Bytes in HBM of an array's type, the padding of its tiles included; 0 if it is elsewhere."""
    found = re.match(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::T\(([\d,]+)\))?)?", type_)
    if not found or re.search(r"S\(\d+\)", type_):
        return 0.0
    sizes = [int(size) for size in found[2].split(",") if size]
    if found[4]:
        order = [int(axis) for axis in found[3].split(",") if axis]
        tile = [int(size) for size in found[4].split(",")]
        for axis, size in zip(order, reversed(tile), strict=False):
            sizes[axis] = -(-sizes[axis] // size) * size
    return math.prod(sizes) * hlo.element_bytes(found[1])


def _peak(program: hlo.Program, name: str, donated: set[int] | None) -> list[Array]:
    """What a computation needs at once.

    Args:
      program: the whole.
      name: of the computation.
      donated: which of its results lie in memory that is the caller's; None: all.
    """
    ops = list(program.computations[name].values())
    memory = _Memory(ops)
    root = next((op for op in ops if op.is_root), ops[-1])
    for place, buffer in enumerate(memory.buffers[root.name]):
        memory.last[buffer] = len(ops)
        if donated is None or place in donated:
            memory.sizes[buffer] = 0.0
    starts, ends = defaultdict(list), defaultdict(list)
    for buffer, size in enumerate(memory.sizes):
        if size:
            starts[memory.first[buffer]].append(buffer)
            ends[memory.last[buffer]].append(buffer)
    live: dict[int, float] = {}
    most, best = -1.0, list[Array]()
    for place, op in enumerate(ops):
        live |= {buffer: memory.sizes[buffer] for buffer in starts[place]}
        inside = max(
            (_peak(program, inner, None) for inner in hlo.called(op)), key=_sum, default=[]
        )
        if sum(live.values()) + _sum(inside) > most:
            best = [memory.describe(buffer) for buffer in live] + inside
            most = _sum(best)
        for buffer in ends[place]:
            del live[buffer]
    return best


def _sum(arrays: Sequence[Array]) -> float:
    return sum(array.bytes for array in arrays)


class _Memory:
    """The buffers of one computation; several instructions' results may share one.

    Attributes:
      buffers: by instruction, the buffer of each array of its result.
      sizes: bytes of each buffer that are temporary and in HBM.
      first: the place of the instruction that makes it.
      last: the place of the last one that reads it.
    """

    def __init__(self, ops: Sequence[hlo.Op]):
        self.buffers: dict[str, list[int]] = {}
        self.sizes: list[float] = []
        self.first: list[int] = []
        self.last: list[int] = []
        self._types: list[str] = []
        self._scopes: list[str] = []
        self._ops = {op.name: op for op in ops}
        readers = {name: place for place, op in enumerate(ops) for name in op.operands}
        for place, op in enumerate(ops):
            operands = [name for name in op.operands if name in self.buffers]
            shared = self._shared(op, operands)
            if op.opcode == "fusion" and "kind=kLoop" in op.rest and not shared:
                dying = [name for name in operands if readers[name] == place]
                shared = self._of_same_type(op, dying)
            made = [
                shared[index] if index in shared else self._new(place, op, type_)
                for index, type_ in enumerate(hlo.leaves(op.type))
            ]
            self.buffers[op.name] = made
            read = [buffer for name in operands for buffer in self.buffers[name]]
            # Of a tuple's arrays only the one that is taken out lives on.
            for buffer in made if op.opcode == "get-tuple-element" else (*made, *read):
                self.last[buffer] = place

    def describe(self, buffer: int) -> Array:
        type_ = re.sub(r"\{.*", "", self._types[buffer])
        return Array(self.sizes[buffer], type_, self._scopes[buffer])

    def _new(self, place: int, op: hlo.Op, type_: str) -> int:
        free = op.opcode in ("parameter", "constant")
        self.sizes.append(0.0 if free else padded_bytes(type_))
        self.first.append(place)
        self.last.append(place)
        self._types.append(type_)
        self._scopes.append(op.scope or op.name)
        return len(self.sizes) - 1

    def _shared(self, op: hlo.Op, operands: Sequence[str]) -> dict[int, int]:
        """By array of the result, the operand's buffer that it is."""
        flat = [buffer for name in operands for buffer in self.buffers[name]]
        if op.opcode in ("tuple", "while", "bitcast", "opt-barrier"):
            return dict(enumerate(flat))
        if op.opcode == "get-tuple-element":
            before = hlo.parts(self._ops[operands[0]].type)[: hlo.number(r"index=(\d+)", op.rest)]
            first = sum(len(hlo.leaves(part)) for part in before)
            return dict(enumerate(flat[first:]))
        if op.opcode == "dynamic-update-slice":
            return {0: flat[0]}
        if op.opcode.endswith(("-start", "-done")):
            return self._of_same_type(op, operands)
        return self._stated(op, operands)

    def _stated(self, op: hlo.Op, operands: Sequence[str]) -> dict[int, int]:
        """Of a fusion, what its configuration says: numbers of operands, then of results."""
        stated = re.search(r'"aliasing_operands":\{"lists":\[(.*?)\]\}\]?\}', op.rest)
        shared = {}
        for group in re.findall(r'"indices":\[(.*?)\]', stated[0]) if stated else []:
            numbers = [int(number) for number in re.findall(r"\d+", group)]
            inputs = [number for number in numbers if number < len(operands)]
            for number in numbers:
                if inputs and number >= len(operands):
                    shared[number - len(operands)] = self.buffers[operands[inputs[0]]][0]
        return shared

    def _of_same_type(self, op: hlo.Op, operands: Sequence[str]) -> dict[int, int]:
        """Arrays of the result that are like one of the operands', each taken once.

        Of a copy the source is named last, of its end the copy first.
        """
        free = {buffer: self._types[buffer] for name in operands for buffer in self.buffers[name]}
        results = list(enumerate(hlo.leaves(op.type)))
        shared = {}
        for index, type_ in reversed(results) if op.opcode == "copy-start" else results:
            match = next((buffer for buffer, other in free.items() if other == type_), None)
            if match is not None:
                shared[index] = match
                del free[match]
        return shared
