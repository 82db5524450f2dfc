"""The report: one self-contained page that shows a whole run."""

from distill_jax.evaluation.report.contents import (
    Answer,
    Curve,
    Cut,
    Kind,
    Prompt,
    Report,
    Row,
    Stage,
    StoredTargets,
)
from distill_jax.evaluation.report.statistics import (
    Estimate,
    estimate,
    paired_difference,
    read_curve,
)
from distill_jax.evaluation.report.write import render, write_report

__all__ = [
    "Answer",
    "Curve",
    "Cut",
    "Estimate",
    "Kind",
    "Prompt",
    "Report",
    "Row",
    "Stage",
    "StoredTargets",
    "estimate",
    "paired_difference",
    "read_curve",
    "render",
    "write_report",
]
