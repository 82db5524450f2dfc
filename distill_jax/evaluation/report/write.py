"""One self-contained page from a `Report`."""

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any

import jinja2
from etils import epath
from markupsafe import Markup

from distill_jax import artifacts
from distill_jax.evaluation.report import tables
from distill_jax.evaluation.report.contents import Answer, Report
from distill_jax.evaluation.report.statistics import Estimate, estimate


@dataclasses.dataclass(frozen=True)
class Tile:
    """One of the figures on top of the page."""

    label: str
    figure: str
    detail: str


@dataclasses.dataclass(frozen=True)
class Legend:
    """A curve's name, colour, dash pattern and last value."""

    name: str
    series: int
    dashes: str
    seeds: int


def write_report(directory: str | os.PathLike[str], report: Report) -> epath.Path:
    """Writes index.html into `directory` and returns its path.

    The page loads nothing: style, plots and all figures are inside. The same report gives the same
    bytes.

    Args:
      directory: made if it does not exist.
      report: what to show.
    """
    place = epath.Path(directory)
    place.mkdir(parents=True, exist_ok=True)
    artifacts.write_bytes(place / "index.html", render(report).encode())
    return place / "index.html"


def render(report: Report) -> str:
    """The page's HTML; every text in `report` is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("distill_jax.evaluation.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "nats": tables.nats,
        "signed": lambda value: f"{value:+.3f}".replace("-", "−"),
        "percent": tables.percent,
        "count": tables.count_text,
        "size": tables.size_text,
        "duration": tables.duration_text,
        "visible": visible,
        "hyphenated": hyphenated,
        "capitalised": capitalised,
    }
    return environment.get_template("template.html").render(**_context(report))


def _context(report: Report) -> dict[str, Any]:
    from distill_jax.evaluation.report import plots  # late: Matplotlib costs most of a second

    quality = [(split, tables.quality_table(report, split)) for split in report.splits]
    panels = [
        (title, plots.curve_plot(report.curves, metric, f"curve{i}"))
        for i, (metric, title) in enumerate(report.curve_metrics)
    ]
    later = [
        (panel.title, plots.panel_plot(panel, f"posttraining{i}"))
        for i, panel in enumerate(report.posttraining)
    ]
    cost = tables.cost_table(report)
    svgs = plots.cut_plots(report.cut) if report.cut else {}
    return {
        "report": report,
        "tiles": _tiles(report),
        "headline": headline(report),
        "verdicts": tables.verdicts(report),
        "around_zero": tables.around_zero,
        "cut_plots": {name: Markup(svg) for name, svg in svgs.items()},
        "colour_stops": plots.colour_stops(),
        "curve_plots": [(title, Markup(svg)) for title, svg in panels if svg is not None],
        "posttraining_plots": [(title, Markup(svg)) for title, svg in later if svg is not None],
        "legend": [
            Legend(curve.name, i % plots.SERIES, plots.DASHES[i % plots.SERIES], len(curve.runs))
            for i, curve in enumerate(report.curves)
        ],
        "quality": [(split, table, tables.strips(table, 0)) for split, table in quality],
        "cost": cost,
        "cost_rows": tables.merge_alike(cost),
        "bytes_per_token": tables.bytes_per_token,
        "times_smaller": tables.times_smaller,
        "bar_widths": bar_widths,
        "seeds": max(len(row.runs) for row in report.rows),
    }


def headline(report: Report) -> tuple[str, str]:
    """The result: what became smaller, and what that did to its quality."""
    before, after = _parameters(report)
    speed = ""
    if speeds := _speeds(report):
        ratio = speeds[1] / speeds[0]
        speed = f" and {ratio:.1f}× faster" if ratio >= 1 else f" and {1 / ratio:.1f}× slower"
    start, end, goal = _perplexities(report)
    return (
        f"{report.teacher} became a student of {tables.count_text(after)} parameters, "
        f"{before / after:.1f}× smaller{speed}.",
        f"Its {hyphenated(report.splits[0])} perplexity is {tables.rate(end)}, "
        f"{'down' if end < start else 'up'} from {tables.rate(start)} right after the cut; "
        f"the teacher has {tables.rate(goal)}.",
    )


def _parameters(report: Report) -> tuple[float, float]:
    """The teacher's and the student's."""
    before, after = (report.row(name).runs[0] for name in (report.teacher, report.student))
    return before["parameters"], after["parameters"]


def _speeds(report: Report) -> tuple[float, float] | None:
    """The teacher's and the student's tokens/s in generation, if both were measured."""
    names = (report.teacher, report.student)
    slow, fast = (_figure(report, name, "generation_tokens_per_s") for name in names)
    return (slow.mean, fast.mean) if slow and fast else None


def _perplexities(report: Report) -> tuple[float, float, float]:
    """After the cut, of the student, of the teacher; on the first split."""
    start, end, goal = (
        estimate(tables.values(report.row(name), (report.splits[0], "perplexity"))).mean
        for name in (report.pruned, report.student, report.teacher)
    )
    return start, end, goal


def _figure(report: Report, row: str, *path: str) -> Estimate | None:
    found = tables.values(report.row(row), path)
    return estimate(found) if found else None


def _tiles(report: Report) -> list[Tile]:
    split = report.splits[0]
    before, after = _parameters(report)
    detail = f"{100 * after / before:.0f}% of the teacher's {tables.count_text(before)}"
    tiles = [Tile("Parameters", tables.count_text(after), detail)]
    if speeds := _speeds(report):
        detail = " → ".join(map(tables.rate, speeds)) + " tokens/s"
        tiles.append(Tile("Generation", f"{speeds[1] / speeds[0]:.1f}×", detail))
    start, end, goal = map(tables.rate, _perplexities(report))
    name = f"{capitalised(hyphenated(split))} perplexity"
    tiles.append(Tile(name, end, f"{start} after the cut; teacher {goal}"))
    for teacher in tables.teachers(report, split)[:1]:
        names = (report.student, report.pruned)
        ours, cut = (_figure(report, name, split, "agreement", teacher) for name in names)
        if ours and cut:
            detail = f"of next tokens; {tables.percent(cut.mean)}% after the cut"
            tiles.append(Tile(f"Agrees with {teacher}", f"{tables.percent(ours.mean)}%", detail))
    return tiles


def bar_widths(answers: Sequence[Answer], answer: Answer) -> list[float]:
    """Widths in percent of an answer's bars, on one scale for all answers to a prompt."""
    largest = max((token.probability for each in answers for token in each.next_tokens), default=1)
    return [round(100 * token.probability / largest, 2) for token in answer.next_tokens]


def hyphenated(name: str) -> str:
    """held_out as people write it."""
    return name.replace("_", "-")


def capitalised(text: str) -> str:
    """The first letter large, the others as they are."""
    return text[:1].upper() + text[1:]


def visible(text: str) -> str:
    """A token with its white space made visible."""
    text = re.sub(r"^ | $", "␣", text).replace("\n", "↵").replace("\t", "⇥")
    return text or "∅"
