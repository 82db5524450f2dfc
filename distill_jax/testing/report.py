"""What a check found."""

import dataclasses
import textwrap


@dataclasses.dataclass(frozen=True)
class Result:
    """Whether one property held for targets of one kind.

    Attributes:
      name: of the property.
      says: what must hold, in plain words.
      targets: the kind of targets; "labels" if there is no teacher.
      outcome: "passed", "failed" or "skipped".
      detail: why it was skipped, or the smallest case found on which it fails.
    """

    name: str
    says: str
    targets: str
    outcome: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """Every property for every kind of targets. `str` of it is a table.

    Attributes:
      results: in the order of trial.
      refused: kinds of targets that the loss does not take, with what it said.
    """

    results: tuple[Result, ...]
    refused: dict[str, str] = dataclasses.field(default_factory=dict)

    def _names(self, outcome: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(r.name for r in self.results if r.outcome == outcome))

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the properties that do not hold for some kind of targets."""
        return self._names("failed")

    @property
    def passed(self) -> tuple[str, ...]:
        """Names of those that hold for every kind of targets for which they were tried."""
        return tuple(name for name in self._names("passed") if name not in self.failed)

    @property
    def skipped(self) -> dict[str, str]:
        """Names of those that were tried for no kind of targets, with the reason."""
        tried = {result.name for result in self.results if result.outcome != "skipped"}
        return {r.name: r.detail for r in self.results if r.name not in tried}

    def __str__(self) -> str:
        columns = list(dict.fromkeys(result.targets for result in self.results))
        cells = {(result.name, result.targets): result.outcome for result in self.results}
        shown = {"passed": "ok", "failed": "FAILS", "skipped": "-"}
        names = dict.fromkeys(result.name for result in self.results)
        widths = [max(8, len(column)) for column in columns]
        wide = max(map(len, names), default=0)
        lines = [_row("", wide, columns, widths)]
        for name in names:
            outcomes = [shown[cells[name, column]] for column in columns]
            reason = self.skipped.get(name)
            lines.append(_row(name, wide, outcomes, widths) + (f"  {reason}" if reason else ""))
        lines += [f"no {kind} targets: {reason}" for kind, reason in self.refused.items()]
        return "\n".join(line.rstrip() for line in lines)

    def failures(self) -> str:
        """Each property that fails, in plain words, with its smallest case."""
        parts = [
            "1 property does not hold."
            if len(self.failed) == 1
            else f"{len(self.failed)} properties do not hold."
        ]
        for name in self.failed:
            found = [r for r in self.results if r.name == name and r.outcome == "failed"]
            kinds = ", ".join(result.targets for result in found)
            detail = textwrap.indent(found[0].detail, "  ")
            parts.append(f"{name} ({kinds}): {found[0].says}.\n{detail}")
        return "\n\n".join(parts)


def _row(name: str, wide: int, cells: list[str], widths: list[int]) -> str:
    return "  ".join([name.ljust(wide), *(c.ljust(w) for c, w in zip(cells, widths, strict=True))])


class PropertyError(AssertionError):
    """A loss lacks properties that it must have. `report` holds all that was found."""

    def __init__(self, report: Report):
        super().__init__(f"{report.failures()}\n\n{report}")
        self.report = report
