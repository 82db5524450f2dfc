"""The pruning stage: calibration batches in, a smaller model, its scores and its plan out."""

import dataclasses
import os
from collections.abc import Iterable
from typing import Any, Literal

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from distill_jax import models, parallel
from distill_jax.artifacts import InputError, check_choices
from distill_jax.pruning.activations import Batch
from distill_jax.pruning.head_merging import merge_query_heads
from distill_jax.pruning.importance import ImportanceConfig
from distill_jax.pruning.merging import merge_kv_heads
from distill_jax.pruning.plan import KvChoice, LayerChoice, Plan, check_shapes, make_plan
from distill_jax.pruning.repair import Grams, grams, repair
from distill_jax.pruning.reuse import find_or_measure
from distill_jax.pruning.sequential import check_ridge, repair_in_sequence
from distill_jax.pruning.surgery import apply_plan, jit_cut, target_shardings
from distill_jax.pruning.tying import TyingSums, tie, ties, tying_sums

RepairOrder = Literal["at_once", "in_sequence"]
"""How projections are repaired: `repair`, or `repair_in_sequence`."""

HeadChoice = Literal["drop", "merge"]
"""What becomes of query heads that go: nothing, or `merge_query_heads`."""

SCORES_FILE = "scores.safetensors"
PLAN_FILE = "plan.json"
"""Files that `prune` writes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneConfig(ImportanceConfig):
    """How a model is pruned; the fields of `ImportanceConfig`, and these.

    Attributes:
      target: shape of the pruned model.
      layer_choice: which layers go, see `make_plan`.
      kv_choice: whether key/value heads are dropped or merged, see `make_plan`.
      head_choice: whether query heads that go are merged into those that stay, as Minitron does.
      calibration_rows: rows that scores and repair see; fewer if the batches end first.
      removal_rows: rows on which "perplexity" tries the model without each layer, of those.
      repair: whether least squares make up for what is cut: for the projections, and, if an untied
        model becomes a tied one, for its two ends, see `tie`.
      repair_order: "in_sequence" fits each projection to what the student lacks by then, layers
        that were dropped included, see `repair_in_sequence`; "at_once" fits all of them to the
        full model's inputs, in one pass, see `repair`.
      sequence_rows: rows that a repair in sequence sees, of those; None: all. Devices hold four
        streams of each of their tokens.
      ridge: of the repair. None: in sequence the best for each projection on calibration rows that
        it was not fitted to, at once 1e-2.
    """

    target: models.LlamaConfig
    layer_choice: LayerChoice = "influence"
    kv_choice: KvChoice = "drop"
    head_choice: HeadChoice = "drop"
    calibration_rows: int = 1024
    removal_rows: int = 64
    repair: bool = True
    repair_order: RepairOrder = "in_sequence"
    sequence_rows: int | None = None
    ridge: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("calibration_rows", "removal_rows", "sequence_rows"):
            rows = getattr(self, name)
            if rows is not None and rows < 1:
                raise InputError(f"{name} is {rows}; it must be positive")
        literals = {
            "layer_choice": LayerChoice,
            "kv_choice": KvChoice,
            "head_choice": HeadChoice,
            "repair_order": RepairOrder,
        }
        check_choices(self, literals)
        if self.kv_choice == self.head_choice == "merge":
            raise InputError(
                "kv_choice and head_choice are both 'merge'; query heads that go are merged into "
                "those of their own key/value head, which must stay one"
            )
        if self.ridge is not None and not self.ridge > 0:
            raise InputError(f"ridge is {self.ridge}; it must be positive")


def prune(
    model: models.Model,
    batches: Iterable[Batch],
    config: PruneConfig,
    directory: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    tokenizer: str = "",
) -> tuple[models.Model, dict[str, Any]]:
    """Prunes a model to `config.target`.

    Writes scores.safetensors and plan.json into the directory, each whole or not at all; a second
    call with the same inputs writes the same bytes. Scores that are there already, of the same
    model and rows by the same method, are not measured again. Calibration tokens are held in host
    memory, for scores and repair each read them once. The caller saves the model.

    Args:
      model: the model to prune.
      batches: calibration batches; read until there are `config.calibration_rows` rows.
      config: target and method.
      directory: made if it is not there.
      mesh: where rows are split and the pruned parameters placed; None leaves that to JAX.
      tokenizer: fingerprint of the tokenizer that made the rows; empty if it is not known.

    Returns:
      The pruned model, and figures for the stage's manifest.

    Raises:
      InputError: the target does not fit the model, there are no calibration tokens, or too few
        to choose a ridge, or the directory holds scores of another model or of rows by another
        tokenizer.
    """
    check_shapes(model.config, config.target, kv_choice=config.kv_choice)
    rows = _first_rows(batches, config.calibration_rows)
    if config.repair and config.repair_order == "in_sequence" and rows:
        check_ridge(config.ridge, batches=len(_sequence(rows, config)))
    sharding = parallel.batch_sharding(mesh) if mesh else None
    place = epath.Path(directory)
    place.mkdir(parents=True, exist_ok=True)
    by_perplexity = config.layer_choice == "perplexity"
    scores = find_or_measure(
        place / SCORES_FILE,
        model,
        rows,
        config,
        removal_rows=_first_rows(rows, config.removal_rows) if by_perplexity else (),
        tokenizer=tokenizer,
        batch_sharding=sharding,
    )
    plan = make_plan(
        scores,
        model.config,
        config.target,
        layer_choice=config.layer_choice,
        kv_choice=config.kv_choice,
    )
    parallel.on_main(lambda: plan.save(place / PLAN_FILE), what=PLAN_FILE)
    start = merge_kv_heads(plan, model.params)
    if config.head_choice == "merge":
        start = merge_query_heads(plan, scores, start)
    if config.repair and ties(plan):
        start = start | jit_tie(plan, mesh)(start, tying_sums(model, rows, mesh=mesh))
    student = _student(model, plan, start, rows, config, mesh)
    figures = {
        "method": plan.method,
        "source_parameters": model.config.parameters,
        "parameters": config.target.parameters,
        "kept_layers": plan.layers.tolist(),
        "calibration_rows": sum(len(batch["tokens"]) for batch in rows),
        "calibration_fingerprint": scores.rows,
        "source_fingerprint": scores.model,
        "repair": config.repair_order if config.repair else "none",
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


def _sequence(rows: list[Batch], config: PruneConfig) -> list[Batch]:
    """What a repair in sequence sees of the calibration rows."""
    return rows if config.sequence_rows is None else _first_rows(rows, config.sequence_rows)


def jit_tie(plan: Plan, mesh: Mesh | None) -> Any:
    """`tie`, jitted: the parameters it changes alone, the others need not be copied."""
    names = ("embedding", "final_norm")

    def tied(params: models.Params, sums: TyingSums) -> models.Params:
        made = tie(plan, params, sums, mesh=mesh)
        return {name: made[name] for name in names}

    if mesh is None:
        return jax.jit(tied)
    axes = {name: models.logical_axes(plan.source)[name] for name in names}
    shapes = {name: models.abstract_params(plan.source)[name] for name in names}
    return jax.jit(tied, out_shardings=parallel.shardings(mesh, axes, shapes))


def jit_repair(plan: Plan, ridge: float | None, mesh: Mesh | None) -> Any:
    """`repair` and the cut, jitted: parameters and `grams` in, the student's parameters out."""

    def cut(params: models.Params, sums: Grams) -> models.Params:
        repaired = repair(plan, params, sums, ridge=1e-2 if ridge is None else ridge, mesh=mesh)
        return apply_plan(plan, repaired, mesh=mesh)

    return jax.jit(cut, out_shardings=target_shardings(plan, mesh))


def _student(
    model: models.Model,
    plan: Plan,
    start: models.Params,
    rows: list[Batch],
    config: PruneConfig,
    mesh: Mesh | None,
) -> models.Model:
    """`start`, parameters of the model's shape, cut and repaired to do what the model does."""
    if not config.repair:
        params = jit_cut(plan, mesh)(start)
    elif config.repair_order == "in_sequence":
        params = repair_in_sequence(
            plan, model, _sequence(rows, config), start=start, ridge=config.ridge, mesh=mesh
        )
    else:
        sums = grams(model, plan, rows, mesh=mesh)
        params = jit_repair(plan, config.ridge, mesh)(start, sums)
    return models.Model(plan.target, params)
