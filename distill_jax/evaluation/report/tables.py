"""The report's tables and its verdict, computed from the rows."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from distill_jax.evaluation.report.contents import Report, Row, StoredTargets
from distill_jax.evaluation.report.statistics import Estimate, estimate, paired_difference


@dataclasses.dataclass(frozen=True)
class Column:
    """One figure of every row.

    Attributes:
      path: keys that lead to it in an object of `evaluate`.
      group: a head over several columns, or "".
      label: the head of the column.
      hint: what it is, for who does not know.
      better: which way is good; None if neither is.
      text: how a value is written.
    """

    path: tuple[str, ...]
    group: str
    label: str
    hint: str
    better: Literal["low", "high"] | None
    text: Callable[[float], str]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One figure of one row, written out.

    Attributes:
      estimate: the figure; None if this row lacks it.
      text: its mean as shown.
      error: its standard error as shown, or "".
      best: whether no other student's is better.
    """

    estimate: Estimate | None
    text: str = "–"
    error: str = ""
    best: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns, and for each row its cells in their order."""

    columns: Sequence[Column]
    rows: Sequence[tuple[Row, Sequence[Cell]]]


@dataclasses.dataclass(frozen=True)
class Strip:
    """Where seeds, their mean and zero lie on a line, in percent of its length."""

    dots: Sequence[float]
    mean: float
    zero: float


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The student against one control in one figure where less is better.

    Attributes:
      control: the control's name.
      figure: what is compared.
      difference: student - control, paired by seed; below zero the student is better.
      outcome: "beats" or "loses to" if the difference is over two standard errors from zero (or
        there is one seed only), else "ties with".
      wins: seeds in which the student is better.
    """

    control: str
    figure: str
    difference: Estimate
    outcome: Literal["beats", "loses to", "ties with"]
    wins: int


def nats(value: float) -> str:
    """1.234."""
    return f"{value:.3f}"


def percent(value: float) -> str:
    """56.7 of a share of 0.567."""
    return f"{100 * value:.1f}"


def perplexity(value: float) -> str:
    """20.84, 208.4, 2,084."""
    return f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def rate(value: float) -> str:
    """12.3 or 1,234."""
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def quality_table(report: Report, split: str) -> Table:
    """How good every model is on a split, and how close to each teacher."""
    columns = [
        Column((split, "cross_entropy"), "", "Cross-entropy", "nats a token", "low", nats),
        Column(
            (split, "perplexity"), "", "Perplexity", "e to the cross-entropy", "low", perplexity
        ),
        Column(
            (split, "top1_accuracy"), "", "Top-1 %", "next token guessed right", "high", percent
        ),
        Column(
            (split, "calibration_error"),
            "",
            "ECE %",
            "expected calibration error: confidence against accuracy in 15 bins",
            "low",
            percent,
        ),
    ]
    if split == report.splits[0]:
        columns.append(
            Column(("task_accuracy",), "", "Task %", "verifiable questions right", "high", percent)
        )
    for teacher in teachers(report, split):
        columns += [
            Column((split, "kl", teacher), f"To {teacher}", "KL", "nats a token", "low", nats),
            Column(
                (split, "agreement", teacher),
                f"To {teacher}",
                "Agrees %",
                "both prefer the same next token",
                "high",
                percent,
            ),
        ]
    return _table(report.rows, columns)


def cost_table(report: Report) -> Table:
    """Size and speed of every model."""
    return _table(
        report.rows,
        [
            Column(("parameters",), "", "Parameters", "all", None, count_text),
            Column(
                ("non_embedding_parameters",),
                "",
                "Without embedding",
                "parameters outside the embedding",
                None,
                count_text,
            ),
            Column(("flops_per_token",), "", "FLOPs/token", "forward", None, count_text),
            Column(("prefill_tokens_per_s",), "", "Prefill tokens/s", "measured", None, rate),
            Column(("generation_tokens_per_s",), "", "Generation tokens/s", "measured", None, rate),
        ],
    )


def merge_alike(table: Table) -> list[tuple[Sequence[str], Sequence[Cell]]]:
    """The table's rows, those with the same figures as one: their names, and the cells."""
    groups: dict[tuple[str, ...], tuple[list[str], Sequence[Cell]]] = {}
    for row, cells in table.rows:
        texts = tuple(cell.text for cell in cells)
        groups.setdefault(texts, ([], cells))[0].append(row.name)
    return list(groups.values())


def teachers(report: Report, split: str) -> list[str]:
    """The teachers that the runs are compared with."""
    return list(report.row(report.student).runs[0][split].get("kl", {}))


def values(row: Row, path: Sequence[str]) -> list[float]:
    """One figure of every run of a row; empty if a run lacks it."""
    found = []
    for run in row.runs:
        value: Any = run
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is None:
            return []
        found.append(float(value))
    return found


def _table(rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    cells = [[_cell(row, column) for column in columns] for row in rows]
    kept = [i for i in range(len(columns)) if any(line[i].estimate for line in cells)]
    for i in kept:
        _mark_best(rows, columns[i], cells, i)
    return Table(
        [columns[i] for i in kept],
        [(row, [line[i] for i in kept]) for row, line in zip(rows, cells)],
    )


def _cell(row: Row, column: Column) -> Cell:
    found = values(row, column.path)
    if not found:
        return Cell(None)
    figure = estimate(found)
    error = _error_text(column, figure.error) if figure.error else ""
    return Cell(figure, column.text(figure.mean), error)


def _error_text(column: Column, error: float) -> str:
    """The error with the decimals of its mean; one too small for them is said to be so."""
    text = column.text(error)
    return text if text.strip("0.") else f"<{text[:-1]}1"


def _mark_best(rows: Sequence[Row], column: Column, cells: list[list[Cell]], i: int) -> None:
    """Marks the best of those that were trained or cut here; a teacher does not compete."""
    figures = [line[i].estimate for line in cells]
    rivals = {
        j: figure.mean
        for j, (row, figure) in enumerate(zip(rows, figures))
        if row.kind != "teacher" and figure
    }
    if column.better is None or len(rivals) < 2:
        return
    best = (min if column.better == "low" else max)(rivals, key=rivals.__getitem__)
    cells[best][i] = dataclasses.replace(cells[best][i], best=True)


def verdicts(report: Report) -> list[Verdict]:
    """The student against every control, on the first split."""
    split = report.splits[0]
    figures: list[tuple[str, tuple[str, ...]]] = [("cross-entropy", (split, "cross_entropy"))]
    figures += [(f"KL to {name}", (split, "kl", name)) for name in teachers(report, split)]
    student = report.row(report.student)
    return [
        _verdict(control.name, figure, values(student, path), values(control, path))
        for control in report.rows
        if control.kind == "control"
        for figure, path in figures
    ]


def _verdict(control: str, figure: str, ours: Sequence[float], theirs: Sequence[float]) -> Verdict:
    difference = paired_difference(ours, theirs)
    clear = difference.error is None or abs(difference.mean) > 2 * difference.error
    won = difference.mean < 0
    return Verdict(
        control=control,
        figure=figure,
        difference=difference,
        outcome="ties with"
        if not clear or difference.mean == 0
        else "beats"
        if won
        else "loses to",
        wins=sum(value < 0 for value in difference.values),
    )


def around_zero(verdict: Verdict, verdicts: Sequence[Verdict]) -> Strip:
    """Where a verdict's seeds, their mean and zero lie; one scale for each figure."""
    alike = [other.difference for other in verdicts if other.figure == verdict.figure]
    everything = [0.0, *(value for difference in alike for value in difference.values)]
    low, high = min(everything), max(everything)
    margin = 0.06 * (high - low)
    return _strip(verdict.difference, low - margin, high + margin)


def strips(table: Table, column: int) -> list[Strip | None]:
    """For each row, where its runs and their mean lie among all rows."""
    figures = [cells[column].estimate for _, cells in table.rows]
    everything = [value for figure in figures if figure for value in figure.values]
    low, high = min(everything), max(everything)
    return [_strip(figure, low, high) if figure else None for figure in figures]


def _strip(figure: Estimate, low: float, high: float) -> Strip:
    def percent_along(value: float) -> float:
        return round(100 * (value - low) / ((high - low) or 1.0), 2)

    return Strip(
        dots=[percent_along(value) for value in figure.values],
        mean=percent_along(figure.mean),
        zero=percent_along(0.0),
    )


def bytes_per_token(store: StoredTargets) -> float:
    """Bytes on disk for one distribution."""
    return store.bytes / store.tokens


def times_smaller(store: StoredTargets) -> float:
    """How many times less than whole distributions in two bytes an entry."""
    return 2 * store.vocab_size / bytes_per_token(store)


def count_text(value: float) -> str:
    """A count for people: 950, 12.5k, 134.5M, 1.2B."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return (
                f"{value / size:.3g}{suffix}"
                if value < 100 * size
                else f"{value / size:.0f}{suffix}"
            )
    return f"{value:.0f}"


def size_text(size: float) -> str:
    """A size for people: 950 B, 12.5 kB, 48.2 MB."""
    for unit, suffix in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {suffix}"
    return f"{size:.0f} B"


def duration_text(seconds: float) -> str:
    """A time for people: 4.2 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
