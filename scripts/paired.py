"""Differences between two ways over the same seeds, told from noise."""

import dataclasses
from collections.abc import Sequence

import scipy.stats

from distill_jax.evaluation.report.statistics import Estimate, estimate, paired_difference


@dataclasses.dataclass(frozen=True)
class Difference:
    """ours - theirs in one figure, seed by seed; `half` is of its 95% interval (Student's t)."""

    ours: str
    theirs: str
    figure: str
    paired: Estimate
    half: float | None

    @property
    def outcome(self) -> str:
        if self.half is None:
            return "one seed tells nothing of noise"
        if abs(self.paired.mean) <= self.half:
            return "within noise"
        return "below" if self.paired.mean < 0 else "above"

    def text(self, digits: int) -> str:
        half = "" if self.half is None else f" ± {self.half:.{digits}f}"
        return f"{self.paired.mean:+.{digits}f}{half}"


def difference(
    ours: tuple[str, Sequence[float]], theirs: tuple[str, Sequence[float]], figure: str
) -> Difference:
    """Of two ways, each a name and its values by seed."""
    paired, half = paired_difference(ours[1], theirs[1]), None
    if paired.error is not None:
        half = float(scipy.stats.t.ppf(0.975, len(paired.values) - 1)) * paired.error
    return Difference(ours[0], theirs[0], figure, paired, half)


def mean(values: Sequence[float], digits: int) -> str:
    """The mean of values by seed, and its standard error."""
    over_seeds = estimate(values)
    error = "" if over_seeds.error is None else f" ± {over_seeds.error:.{digits}f}"
    return f"{over_seeds.mean:.{digits}f}{error}"
