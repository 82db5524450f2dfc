"""How good the models are, and the page that shows it.

`lm_eval_adapter` is not imported here: it needs the `eval` extra. Nor is `search_picture`:
Matplotlib costs most of a second, which most commands need not wait.
"""

from distill_jax.evaluation.evaluate import EvaluationConfig, evaluate
from distill_jax.evaluation.next_tokens import NextToken, next_tokens
from distill_jax.evaluation.report import (
    Answer,
    Curve,
    Cut,
    FinishedStage,
    Panel,
    Prompt,
    Report,
    Row,
    StoredTargets,
    read_curve,
    write_report,
)
from distill_jax.evaluation.search import search_table
from distill_jax.evaluation.speed import SpeedConfig, measure_speed

__all__ = [
    "Answer",
    "Curve",
    "Cut",
    "EvaluationConfig",
    "FinishedStage",
    "NextToken",
    "Panel",
    "Prompt",
    "Report",
    "Row",
    "SpeedConfig",
    "StoredTargets",
    "evaluate",
    "measure_speed",
    "next_tokens",
    "read_curve",
    "search_table",
    "write_report",
]
