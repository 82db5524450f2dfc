"""The report: one self-contained page that shows a whole run."""

from distill_jax.evaluation.report.contents import (
    Answer,
    Curve,
    Cut,
    FinishedStage,
    Kind,
    Panel,
    Prompt,
    Report,
    Row,
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
    "FinishedStage",
    "Kind",
    "Panel",
    "Prompt",
    "Report",
    "Row",
    "StoredTargets",
    "estimate",
    "paired_difference",
    "read_curve",
    "render",
    "write_report",
]
