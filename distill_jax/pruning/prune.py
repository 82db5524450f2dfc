"""The pruning stage: calibration batches in, a smaller model, its scores and its plan out."""

import dataclasses
import os
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from distill_jax import models, parallel
from distill_jax.artifacts import InputError
from distill_jax.pruning.activations import Batch
from distill_jax.pruning.importance import ImportanceConfig, importance
from distill_jax.pruning.plan import LayerChoice, Plan, check_shapes, make_plan
from distill_jax.pruning.repair import Grams, grams, repair
from distill_jax.pruning.surgery import apply_plan

SCORES_FILE = "scores.safetensors"
PLAN_FILE = "plan.json"
"""Files that `prune` writes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneConfig(ImportanceConfig):
    """How a model is pruned; the fields of `ImportanceConfig`, and these.

    Attributes:
      target: shape of the pruned model.
      layer_choice: which layers go, see `make_plan`.
      calibration_rows: rows that scores and repair see; fewer if the batches end first.
      repair: whether the projections are repaired by least squares, see `repair`.
      ridge: of the repair.
    """

    target: models.LlamaConfig
    layer_choice: LayerChoice = "influence"
    calibration_rows: int = 1024
    repair: bool = True
    ridge: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calibration_rows < 1:
            raise InputError(f"calibration_rows is {self.calibration_rows}; it must be positive")
        if not self.ridge > 0:
            raise InputError(f"ridge is {self.ridge}; it must be positive")


def prune(
    model: models.Model,
    batches: Iterable[Batch],
    config: PruneConfig,
    directory: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
) -> tuple[models.Model, dict[str, Any]]:
    """Prunes a model to `config.target`.

    Writes scores.safetensors and plan.json into the directory, each whole or not at all; a second
    call with the same inputs writes the same bytes. Calibration tokens are held in host memory,
    for scores and repair each read them once. The caller saves the model.

    Args:
      model: the model to prune.
      batches: calibration batches; read until there are `config.calibration_rows` rows.
      config: target and method.
      directory: made if it is not there.
      mesh: where rows are split and the pruned parameters placed; None leaves that to JAX.

    Returns:
      The pruned model, and figures for the stage's manifest.

    Raises:
      InputError: the target does not fit the model, or there are no calibration tokens.
    """
    check_shapes(model.config, config.target)
    rows = _first_rows(batches, config.calibration_rows)
    sharding = parallel.batch_sharding(mesh) if mesh else None
    scores = importance(model, rows, config, batch_sharding=sharding)
    plan = make_plan(scores, model.config, config.target, layer_choice=config.layer_choice)
    place = epath.Path(directory)
    place.mkdir(parents=True, exist_ok=True)
    scores.save(place / SCORES_FILE)
    plan.save(place / PLAN_FILE)
    sums = grams(model, plan, rows, mesh=mesh) if config.repair else {}
    student = _student(model, plan, sums, config.ridge, mesh)
    figures = {
        "method": plan.method,
        "source_parameters": model.config.parameters,
        "parameters": config.target.parameters,
        "kept_layers": plan.layers.tolist(),
        "calibration_rows": sum(len(batch["tokens"]) for batch in rows),
        "calibration_fingerprint": scores.rows,
        "source_fingerprint": scores.model,
        "repaired": sorted(sums.keys() - {"tokens"}),
    }
    return student, figures


def _first_rows(batches: Iterable[Batch], count: int) -> list[Batch]:
    """The first `count` rows, in batches as they come; the last batch may be smaller."""
    taken: list[Batch] = []
    for batch in batches:
        kept = {
            name: np.asarray(batch[name])[:count]
            for name in ("tokens", "segment_ids")
            if name in batch
        }
        taken.append(kept)
        count -= len(kept["tokens"])
        if count <= 0:
            break
    return taken


def _student(
    model: models.Model, plan: Plan, sums: Grams, ridge: float, mesh: Mesh | None
) -> models.Model:
    def cut(params: models.Params, sums: Grams) -> models.Params:
        return apply_plan(plan, repair(plan, params, sums, ridge=ridge))

    placed = None
    if mesh is not None:
        shapes = models.abstract_params(plan.target)
        placed = parallel.shardings(mesh, models.logical_axes(plan.target), shapes)
    params = jax.jit(cut, out_shardings=placed)(model.params, sums)
    return models.Model(plan.target, params)
