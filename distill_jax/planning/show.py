"""Reports as tables for the terminal."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import rich.table
from rich.console import Group, RenderableType
from rich.text import Text

from distill_jax.planning.report import HARDWARE, Report


def show_report(report: Report, price: float | None) -> RenderableType:
    """Everything that is known of one program.

    Args:
      report: what to show.
      price: dollars a chip and hour, if they are to be counted.
    """
    title = (
        f"{report.program} on {report.topology}, {describe_mesh(report)}, batch {report.batch} "
        f"({report.rows} rows), remat {report.remat}"
    )
    parts: list[RenderableType] = [Text(title, style="bold"), _verdict(report)]
    parts.append(_memory(report))
    if report.largest:
        parts.append(_largest(report))
    if report.step is not None:
        parts += [_time(report), _run(report, price)]
        parts.append(_listed("what takes most", report.heaviest))
        if report.collectives:
            parts.append(_collectives(report))
            parts.append(_listed("largest collectives", report.travels))
    parts += [Text(f"- {line}", style="dim") for line in (*report.assumptions, HARDWARE)]
    return Group(*parts)


def show_choices(
    reports: Sequence[Report], best: Report | None, title: str, price: float | None
) -> rich.table.Table:
    """A line for each report; the recommended one is marked."""
    table = rich.table.Table(title=title, title_justify="left")
    several = len({report.program for report in reports}) > 1
    cost = "chip-hours" if price is None else "dollars"
    for name in (*(("program",) if several else ()), "", "slice", "mesh", "remat", "batch",
                 "HBM GB", "peak GB", "step s", "MFU", "tokens/s/chip", "days", cost):  # fmt: skip
        table.add_column(name, justify="right")
    for report in reports:
        hours = report.chip_hours
        spent = hours if price is None or hours is None else hours * price
        figures = (
            _number(report.step, ".3f"),
            _number(report.mfu, ".1%"),
            _number(report.tokens_per_second, ",.0f"),
            _number(report.days, ",.2f"),
            _number(spent, ",.0f"),
        )
        table.add_row(
            *((report.program,) if several else ()),
            "*" if report is best else "",
            report.topology,
            describe_mesh(report),
            report.remat,
            str(report.batch),
            _number(report.hbm and report.hbm / 1e9, ".2f") + ("" if report.fits else " too much"),
            _number(report.peak and report.peak / 1e9, ".2f"),
            *(figures if report.fits else ("",) * len(figures)),
            style="bold" if report is best else None,
        )
    return table


def describe_mesh(report: Report) -> str:
    """Such as "data 16, fsdp 16"."""
    sizes = [f"{name} {size}" for name, size in report.mesh.items() if size > 1]
    return ", ".join(sizes) or "one device"


def _verdict(report: Report) -> Text:
    if report.hbm is None:
        return Text(f"nobody knows whether it fits: {report.problem}", style="bold red")
    if not report.fits:
        return Text(f"does not fit: {report.problem}", style="bold red")
    share = (report.peak or report.hbm) / report.available
    return Text(
        f"fits: {report.hbm / 1e9:.2f} GB of HBM a chip; the peak is {share:.0%} of what there is",
        style="green",
    )


def _table(*columns: str, left: int = 1) -> rich.table.Table:
    table = rich.table.Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for place, name in enumerate(columns):
        table.add_column(name, justify="left" if place < left else "right", overflow="fold")
    return table


def _memory(report: Report) -> RenderableType:
    table = _table("HBM a chip", "GB")
    for name, size in report.memory.items():
        table.add_row(name, f"{size / 1e9:.3f}")
    if report.peak is not None:
        table.add_row("the compiler's own peak", f"{report.peak / 1e9:.3f}")
        table.add_row("of that, temporaries by part:", "")
        for name, size in report.alive.items():
            table.add_row(f"  {name}", f"{size / 1e9:.3f}")
    return table


def _largest(report: Report) -> RenderableType:
    table = _table("GB", "largest arrays", left=0)
    table.columns[1].justify = "left"
    for size, what in report.largest:
        type_, _, scope = what.partition(" ")
        table.add_row(f"{size / 1e9:.3f}", f"{type_} {_shortened(scope)}")
    return table


def _time(report: Report) -> RenderableType:
    assert report.step is not None
    table = _table("modelled step", "ms", "share")
    rows = [
        ("compute", report.compute),
        ("Pallas kernels", report.kernels),
        ("waiting for collectives", report.waited),
    ]
    for name, seconds in [*rows, ("together", report.step)]:
        table.add_row(name, f"{seconds * 1e3:.1f}", f"{seconds / report.step:.0%}")
    table.add_row("of that, by part:", "", "")
    for name, seconds in sorted(report.parts.items(), key=lambda item: -item[1]):
        table.add_row(f"  {name}", f"{seconds * 1e3:.1f}", f"{seconds / report.step:.0%}")
    table.add_row("collectives beside work", f"{report.hidden * 1e3:.1f}", "")
    table.add_row("not priced, at least", f"{report.unpriced * 1e3:.1f}", "")
    return table


def _run(report: Report, price: float | None) -> RenderableType:
    table = _table("the stage", "")
    flops = report.flops / report.chips
    table.add_row("model FLOPs of a step, a chip", f"{flops:.3e}")
    if report.mfu is not None:
        table.add_row("modelled MFU", f"{report.mfu:.1%}")
    speed, days, hours = report.tokens_per_second, report.days, report.chip_hours
    if speed is not None:
        table.add_row("tokens/s/chip", f"{speed:,.0f}")
    if days is not None and hours is not None:
        table.add_row(f"days, for {report.total_tokens:.4g} tokens", f"{days:,.2f}")
        table.add_row("chip-hours", f"{hours:,.0f}")
        if price is not None:
            table.add_row(f"dollars, at {price:g} a chip and hour", f"{price * hours:,.0f}")
    return table


def _collectives(report: Report) -> RenderableType:
    table = _table("collectives", "a step", "MB sent", "ms on the links", "ms waited for")
    for kind, found in sorted(report.collectives.items(), key=lambda item: -item[1]["bytes"]):
        table.add_row(
            kind,
            f"{found['count']:,.0f}",
            f"{found['bytes'] / 1e6:,.1f}",
            f"{found['seconds'] * 1e3:.2f}",
            f"{found['waits'] * 1e3:.2f}",
        )
    return table


def _listed(title: str, listed: Sequence[Mapping[str, Any]]) -> RenderableType:
    table = _table("ms", "runs", title, "where it comes from", left=0)
    for column in table.columns[2:]:
        column.justify = "left"
    for one in listed:
        what = f"{one['kind']} {one['detail']}".strip()
        scope = _shortened(one["scope"])
        table.add_row(f"{one['seconds'] * 1e3:.1f}", str(one["runs"]), what, scope)
    return table


def _shortened(scope: str) -> str:
    """Without the words that every path has."""
    return re.sub(r"^jit\(\w+\)/|(while|body|closed_call|checkpoint|shard_map)/", "", scope)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
