"""Structured pruning: importance -> plan -> surgery -> least-squares repair."""

from distill_jax.pruning.activations import Aggregation, Batch
from distill_jax.pruning.calibration import removal_losses
from distill_jax.pruning.files import prune_files
from distill_jax.pruning.head_merging import merge_query_heads
from distill_jax.pruning.importance import ImportanceConfig, importance, model_fingerprint
from distill_jax.pruning.merging import merge_kv_heads
from distill_jax.pruning.picture import draw
from distill_jax.pruning.plan import KvChoice, LayerChoice, Plan, check_shapes, make_plan
from distill_jax.pruning.prune import (
    PLAN_FILE,
    SCORES_FILE,
    HeadChoice,
    PruneConfig,
    RepairOrder,
    prune,
)
from distill_jax.pruning.repair import grams, repair
from distill_jax.pruning.reuse import find_or_measure
from distill_jax.pruning.scores import Scores
from distill_jax.pruning.search import (
    Candidate,
    Cost,
    SearchConfig,
    candidate_shapes,
    cost_of,
    pareto,
    search,
)
from distill_jax.pruning.sequential import repair_in_sequence
from distill_jax.pruning.surgery import apply_plan, take, take_state
from distill_jax.pruning.tying import tie, tying_sums

__all__ = [
    "PLAN_FILE",
    "SCORES_FILE",
    "Aggregation",
    "Batch",
    "Candidate",
    "Cost",
    "HeadChoice",
    "ImportanceConfig",
    "KvChoice",
    "LayerChoice",
    "Plan",
    "PruneConfig",
    "RepairOrder",
    "Scores",
    "SearchConfig",
    "apply_plan",
    "candidate_shapes",
    "check_shapes",
    "cost_of",
    "draw",
    "find_or_measure",
    "grams",
    "importance",
    "make_plan",
    "merge_kv_heads",
    "merge_query_heads",
    "model_fingerprint",
    "pareto",
    "prune",
    "prune_files",
    "removal_losses",
    "repair",
    "repair_in_sequence",
    "search",
    "take",
    "take_state",
    "tie",
    "tying_sums",
]
