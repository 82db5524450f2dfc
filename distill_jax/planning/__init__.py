"""What a recipe's stages would take on a TPU slice that need not be here."""

from distill_jax.planning.command import compile_stage, parse_mesh
from distill_jax.planning.compiling import answer, recommended, sweep, would_fit
from distill_jax.planning.program import Choice, Program, Stage
from distill_jax.planning.programs import stage_programs
from distill_jax.planning.report import Report, make_report
from distill_jax.planning.worker import Question

__all__ = [
    "Choice",
    "Program",
    "Question",
    "Report",
    "Stage",
    "answer",
    "compile_stage",
    "make_report",
    "parse_mesh",
    "recommended",
    "stage_programs",
    "sweep",
    "would_fit",
]
