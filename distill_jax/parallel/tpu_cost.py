"""What a program compiled for a TPU would take, read off its text: nothing is executed.

The compiler prints `estimated_cycles` on most instructions. Their sum, weighed with how often each
runs, is a model of the time and not a measurement of it; `Cost.assumptions` says what it rests on.
"""

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from distill_jax.parallel import hlo
from distill_jax.parallel.topology import Chip

_SUMMED = ("runs", "seconds", "waits", "bytes")
# Of the peak, that Pallas calls are taken to reach. A head of 64 channels fills half of a matrix
# unit, and attention waits for its exponentials.
_KERNEL_SHARE, _NARROW_SHARE, _WIDE = 0.5, 0.3, 128
_IRREGULAR = {"gather", "scatter", "sort", "dynamic-update-slice", "kernel"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collectives:
    """All collectives of one kind in one execution, as one chip sees them.

    Attributes:
      count: how many run; a loop's count every turn.
      bytes: what the chip sends over its links.
      seconds: on the links.
      waits: seconds of these in which the chip has nothing else to do.
    """

    count: int = 0
    bytes: float = 0.0
    seconds: float = 0.0
    waits: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Modelled cost of one execution on one chip.

    Attributes:
      hbm_bytes: arguments + temporaries + outputs - aliased; None if only a text was given. The
        temporaries count what a loop's body holds twice, so this is on the safe side.
      peak_bytes: the compiler's own peak, the one that it refuses programs by; None likewise.
      compute_seconds: instructions with an estimate.
      collective_seconds: waiting for collectives: synchronous ones, and asynchronous ones for as
        long as they take beyond the work between their start and their end.
      kernel_seconds: Pallas calls that state their operations, and splash attention.
      hidden_seconds: asynchronous collectives beside work; not in `seconds`.
      unpriced_seconds: what moving the operands and results of instructions without an estimate
        takes at least (gathers, scatters and sorts left out); not in `seconds`.
      unpriced: how often instructions without an estimate run, by opcode.
      collectives: by kind.
      parts: seconds by named scope, of everything that `seconds` counts; "" for what is in none.
      heaviest: the instructions that take most of `seconds`; those of one kind and place are one.
      largest: the collectives that take most of the links' time, beside work or not.
      assumptions: to be shown beside the figures.
    """

    hbm_bytes: int | None
    peak_bytes: int | None
    compute_seconds: float
    collective_seconds: float
    kernel_seconds: float
    hidden_seconds: float
    unpriced_seconds: float
    unpriced: Mapping[str, int]
    collectives: Mapping[str, Collectives]
    parts: Mapping[str, float]
    heaviest: Sequence["Priced"]
    largest: Sequence["Priced"]
    assumptions: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Work and waiting, one after the other; the links' time if that is more."""
        links = self.collective_seconds + self.hidden_seconds
        return max(self.compute_seconds + self.collective_seconds + self.kernel_seconds, links)


class Priced(NamedTuple):
    """An instruction, and what all of its runs take.

    Attributes:
      category: "unpriced" if the compiler says nothing of its time; `seconds` is then the least
        that memory traffic takes, or 0.
      name: its name in the text.
      kind: what it does.
      runs: how often it runs.
      seconds: of all runs.
      waits: of a collective, the seconds in which the chip has nothing else to do.
      bytes: sent over the links in all runs.
      scope: where in the program it comes from.
      detail: of a collective, its arrays and how many devices take part.
    """

    category: Literal["compute", "collective", "hidden", "kernel", "unpriced"]
    name: str
    kind: str
    runs: int
    seconds: float
    waits: float
    bytes: float
    scope: str
    detail: str = ""


def estimate(
    compiled: Any,
    chip: Chip,
    *,
    parts: Sequence[str] = (),
    heaviest: int = 0,
    turns: int | None = None,
) -> Cost:
    """The cost of a compiled executable, or of its text (then without memory).

    Args:
      compiled: `jax.stages.Compiled` for a TPU, or what its `as_text()` gives.
      chip: what it would run on.
      parts: named scopes (`jax.named_scope`) for which the time is told apart; an instruction is
        the innermost one's.
      heaviest: how many of the instructions that take most are listed, and of the collectives.
      turns: how often a loop turns of which the text does not say that.

    Raises:
      ValueError: no program in the text, or a loop whose number of turns cannot be read, and no
        `turns`.
    """
    stats = None if isinstance(compiled, str) else compiled.memory_analysis()
    seconds: defaultdict[str, float] = defaultdict(float)
    by_part: defaultdict[str, float] = defaultdict(float)
    unpriced: Counter[str] = Counter()
    collectives: defaultdict[str, Collectives] = defaultdict(Collectives)
    listed, travels = [], []
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    for one in priced(text, chip, turns=turns):
        if one.category in ("collective", "hidden"):
            seconds["collective"] += one.waits
            seconds["hidden"] += one.seconds - one.waits
            collectives[one.kind] = _with(collectives[one.kind], one)
            travels.append(one)
            one = one._replace(seconds=one.waits)
        else:
            seconds[one.category] += one.seconds
        if one.category == "unpriced":
            unpriced[one.kind] += one.runs
        else:
            by_part[innermost(one.scope, parts)] += one.seconds
            listed.append(one)
    return Cost(
        hbm_bytes=memory_bytes(stats) if stats else None,
        peak_bytes=stats.peak_memory_in_bytes if stats else None,
        compute_seconds=seconds["compute"],
        collective_seconds=seconds["collective"],
        kernel_seconds=seconds["kernel"],
        hidden_seconds=seconds["hidden"],
        unpriced_seconds=seconds["unpriced"],
        unpriced=dict(unpriced),
        collectives=dict(collectives),
        parts=dict(by_part),
        heaviest=_longest(listed, heaviest),
        largest=_longest(travels, heaviest),
        assumptions=(
            "modelled from the compiler's estimates: nothing was executed",
            f"clock {chip.clock / 1e9:g} GHz, HBM {chip.memory_rate / 1e9:g} GB/s",
            f"ICI {chip.link_rate / 1e9:g} GB/s a link and way; a group of up to 16 devices lies "
            f"along one axis of the slice, a ring from {chip.ring} on; a larger one along two",
            "asynchronous copies cost nothing, asynchronous collectives what they take longer than "
            "the work between their start and end, also those that SparseCores run, which take "
            "nothing from the work's memory rate; of a conditional all branches count",
            f"Pallas calls reach {_KERNEL_SHARE:.0%} of {chip.flops / 1e12:g} TFLOP/s, with heads "
            f"of fewer than {_WIDE} channels {_NARROW_SHARE:.0%}; of splash attention the half of "
            "its products counts that a causal mask leaves",
        ),
    )


def priced(text: str, chip: Chip, *, turns: int | None = None) -> Iterator[Priced]:
    """Every instruction of compiled HLO that takes time or may do so, each collective once.

    A matrix product that the compiler let an asynchronous collective ride on is two of them.
    `turns` is as in `estimate`.

    Raises:
      ValueError: as `estimate`.
    """
    program = hlo.Program(text)
    order = list(program.executed(turns=turns))
    work = [_work(op, around, chip) for op, _, around in order]
    flights = _flights(program, order, work)
    for place, (op, runs, around) in enumerate(order):
        collective, scattered = program.collective(op)
        if work[place].seconds:
            category, each = work[place]
            yield Priced(category, op.name, op.kind, runs, runs * each, 0.0, 0.0, op.scope)
        if collective:
            kind = "reduce-scatter" if scattered else collective.opcode.removesuffix("-start")
            sent = _sent(collective, scattered)
            took = runs * sent / (_links(collective, chip) * chip.link_rate)
            rest = collective.scope or op.scope, _detail(collective)
            if not op.is_asynchronous:
                yield Priced("collective", op.name, kind, runs, took, took, runs * sent, *rest)
            elif place in flights:
                waits = max(took - flights[place], 0.0)
                yield Priced("hidden", op.name, kind, runs, took, waits, runs * sent, *rest)
        elif not (work[place].seconds or op.is_free or "[]" in op.type):
            moved = 0.0
            if op.kind not in _IRREGULAR:
                types = [op.type, *(around[name].type for name in op.operands if name in around)]
                moved = runs * sum(map(hlo.hbm_bytes, types)) / chip.memory_rate
            yield Priced("unpriced", op.name, op.kind, runs, moved, 0.0, 0.0, op.scope)


class _Work(NamedTuple):
    """What one run of an instruction keeps the chip busy with; no seconds if nobody knows."""

    category: Literal["compute", "kernel"]
    seconds: float


def _work(op: hlo.Op, around: hlo.Computation, chip: Chip) -> _Work:
    if cycles := hlo.number(r'"estimated_cycles":"(\d+)"', op.rest):
        return _Work("compute", cycles / chip.clock)
    return _Work("kernel", _kernel_seconds(op, around, chip) if hlo.KERNEL in op.rest else 0.0)


def _kernel_seconds(op: hlo.Op, around: hlo.Computation, chip: Chip) -> float:
    """Of a Pallas call, from the operations that it states, or those of JAX's splash attention.

    Each of that one's matrix products is of queries [..., T, C] with keys [..., S, C], half of
    which are masked.
    """
    if stated := hlo.number(r'"flops":"?(\d+)', op.rest):
        return stated / (_KERNEL_SHARE * chip.flops)
    found = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", op.scope)
    types = [around[name].type for name in op.operands if name in around]
    query, key, *_ = [*filter(None, map(_array, types)), None, None]
    results = [array for array in map(_array, hlo.leaves(op.type)) if array]
    if not (found and query and key and results):
        return 0.0
    # Queries' gradients are then there too, for each block of keys.
    fused = any(len(array) > len(query) for array in results)
    products = {"fwd": 2, "dq": 3, "dkv": 5 if fused else 4}[found[1]]
    channels = max(results, key=len)[-1]  # queries and keys may come transposed
    keys = math.prod(key[-2:]) // channels
    share = _KERNEL_SHARE if channels >= _WIDE else _NARROW_SHARE
    return products * 2 * math.prod(query) * keys / 2 / (share * chip.flops)


def _array(type_: str) -> list[int] | None:
    found = re.match(r"(?:bf16|f32)\[(\d+(?:,\d+){2,})\]", type_)
    return [int(size) for size in found[1].split(",")] if found else None


def _flights(program: hlo.Program, order: Sequence[Any], work: Sequence[_Work]) -> dict[int, float]:
    """Where each asynchronous collective starts, and the seconds of work until it is done.

    An end names its start, or the update between them that hands it its argument: it sets off
    there. Of one that rides on fusions all hold it: the same channel, chain and shape.
    """
    spans: dict[Any, tuple[int, int, int]] = {}  # where it starts, sets off and ends
    starts: dict[str, Any] = {}  # and updates; what follows names them
    for place, (op, _, around) in enumerate(order):
        collective, _ = program.collective(op)
        if collective and op.is_asynchronous:
            shape = re.sub(r"\{[^}]*\}", "", collective.type)
            channel = hlo.number(r"channel_id=(\d+)", collective.rest)
            chain = hlo.number(r'chain_id="(\d+)"', collective.rest)
            alone = channel is None or op.opcode.endswith("-start")
            key = (id(around), op.name) if alone else (channel, chain, shape)
            spans[key] = *spans.get(key, (place, place))[:2], place
            starts[op.name] = key
        elif op.opcode.endswith(("-update", "-done")) and starts.keys() & op.operands[:1]:
            starts[op.name] = key = starts[op.operands[0]]
            start, off, _ = spans[key]
            spans[key] = start, place if op.operands[1:] else off, place
    busy = [0.0]
    for (_, runs, _), each in zip(order, work, strict=True):
        busy.append(busy[-1] + runs * each.seconds)
    return {start: busy[end + 1] - busy[off] for start, off, end in spans.values()}


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
            for computation in hlo.Program(text).computations.values()
            for op in computation.values()
            if op.opcode.removesuffix("-start") in kinds
            for size, _ in hlo.sizes(op.type)
        ),
        default=0.0,
    )


def _with(sum_: Collectives, one: Priced) -> Collectives:
    return Collectives(
        count=sum_.count + one.runs,
        bytes=sum_.bytes + one.bytes,
        seconds=sum_.seconds + one.seconds,
        waits=sum_.waits + one.waits,
    )


def _longest(found: Sequence[Priced], count: int) -> list[Priced]:
    """The first by time; what differs by the name alone is one."""
    same: dict[Any, Priced] = {}
    for one in found:
        key = one.category, one.kind, one.scope, one.detail
        if key in same:
            sums = {n: getattr(one, n) + getattr(same[key], n) for n in _SUMMED}
            one = same[key]._replace(**sums)
        same[key] = one
    return sorted(same.values(), key=lambda one: -one.seconds)[:count]


def innermost(scope: str, parts: Sequence[str]) -> str:
    """The last of the names in a path; transformations wrap them, as in "transpose(jvp(mlp))"."""
    return next((word for word in reversed(re.findall(r"\w+", scope)) if word in parts), "")


def _detail(op: hlo.Op) -> str:
    arrays = re.findall(r"\w+\[[\d,]*\]", op.type)
    more = f" and {len(arrays) - 3} more" if len(arrays) > 3 else ""
    return f"{', '.join(arrays[:3])}{more} over {op.group}"


def _sent(op: hlo.Op, scattered: bool) -> float:
    """Bytes that a chip sends for a collective."""
    sizes = [size for size, _ in hlo.sizes(op.type)]
    size = max(sizes) if "-start" in op.opcode else sum(sizes)
    kind = op.opcode.removesuffix("-start")
    if kind == "collective-permute":
        return size
    group = op.group
    passes = {"reduce-scatter": group, "all-reduce": 1 if scattered else 2, "all-to-all": 0.25}
    return passes.get(kind, 1) * size * (group - 1) / group


def _links(op: hlo.Op, chip: Chip) -> int:
    """Links over which a chip sends at once."""
    if op.opcode.removesuffix("-start") == "collective-permute":
        return 1
    return (1 if op.group <= 16 else 2) * (2 if op.group >= chip.ring else 1)
