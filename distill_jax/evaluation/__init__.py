"""How good the models are, and the page that shows it.

`lm_eval_adapter` is not imported here: it needs the `eval` extra.
"""

from distill_jax.evaluation.evaluate import EvaluationConfig, evaluate
from distill_jax.evaluation.next_tokens import NextToken, next_tokens
from distill_jax.evaluation.report import (
    Answer,
    Curve,
    Cut,
    Prompt,
    Report,
    Row,
    Stage,
    StoredTargets,
    read_curve,
    write_report,
)
from distill_jax.evaluation.speed import SpeedConfig, measure_speed

__all__ = [
    "Answer",
    "Curve",
    "Cut",
    "EvaluationConfig",
    "NextToken",
    "Prompt",
    "Report",
    "Row",
    "SpeedConfig",
    "Stage",
    "StoredTargets",
    "evaluate",
    "measure_speed",
    "next_tokens",
    "read_curve",
    "write_report",
]
