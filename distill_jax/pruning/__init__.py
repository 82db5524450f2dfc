"""Structured pruning: importance -> plan -> surgery -> least-squares repair."""

from distill_jax.pruning.activations import Aggregation, Batch
from distill_jax.pruning.importance import ImportanceConfig, importance, model_fingerprint
from distill_jax.pruning.plan import LayerChoice, Plan, check_shapes, make_plan
from distill_jax.pruning.prune import PLAN_FILE, SCORES_FILE, PruneConfig, prune
from distill_jax.pruning.repair import grams, repair
from distill_jax.pruning.scores import Scores
from distill_jax.pruning.surgery import apply_plan, take

__all__ = [
    "PLAN_FILE",
    "SCORES_FILE",
    "Aggregation",
    "Batch",
    "ImportanceConfig",
    "LayerChoice",
    "Plan",
    "PruneConfig",
    "Scores",
    "apply_plan",
    "check_shapes",
    "grams",
    "importance",
    "make_plan",
    "model_fingerprint",
    "prune",
    "repair",
    "take",
]
