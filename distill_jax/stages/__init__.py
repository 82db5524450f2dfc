"""The stages of a run: each module wires one part of the recipe to the rooms that do the work."""

from distill_jax.pipeline import Stage
from distill_jax.stages import context, corpus, posttraining, report, results, students, teachers
from distill_jax.stages.context import Run

COMMANDS = (
    context.CORPUS,
    "teachers",
    "targets",
    context.ROUNDS,
    context.PRUNE,
    "distill",
    context.POSTTRAINING_ROUNDS,
    context.SFT,
    context.ON_POLICY,
    context.REWARD,
    context.REJECTION,
    context.DPO,
    context.EVALUATE,
    context.EXPORT,
    context.REPORT,
)
"""The commands that run one kind of stage alone, in order."""


def all_stages(run: Run) -> list[Stage]:
    """Every stage of a run, each after those it reads."""
    parts = (corpus, teachers, students, posttraining, results, report)
    return [stage for part in parts for stage in part.stages(run)]


__all__ = ["COMMANDS", "Run", "all_stages"]
