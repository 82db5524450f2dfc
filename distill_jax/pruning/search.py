"""The search for a shape: which sizes, at one cost, leave the model that predicts best."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax

from distill_jax import models, parallel, progress
from distill_jax.artifacts import InputError, check_choices
from distill_jax.pruning.activations import Batch
from distill_jax.pruning.calibration import batch_loss, labelled
from distill_jax.pruning.masking import Masks, mask
from distill_jax.pruning.plan import LayerChoice, check_shapes, make_plan
from distill_jax.pruning.repair import grams, repair
from distill_jax.pruning.scores import Scores
from distill_jax.pruning.surgery import apply_plan

Cost = Literal["parameters", "decode_bytes"]
"""What a budget is counted in; see `cost_of`."""

_LEAST_NEURONS = 8
"""A shape keeps at least one in so many neurons."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """What is tried.

    Attributes:
      budgets: costs; shapes are made to fit each.
      cost: what they count, see `cost_of`.
      tolerance: how far from its budget a shape's cost may be, as a fraction of it.
      steps: sizes of each axis that are tried, evenly spaced from 1 / steps of the source's up.
      context: tokens in the key/value cache, for "decode_bytes".
      tied: whether the student is tied; a tied model's always is.
      repair_best: of so many of the best shapes the repaired student's loss is measured, too.
      ridge: of the repair.
    """

    budgets: tuple[float, ...]
    cost: Cost = "parameters"
    tolerance: float = 0.03
    steps: int = 8
    context: int = 1024
    tied: bool = True
    repair_best: int = 0
    ridge: float = 1e-2

    def __post_init__(self) -> None:
        if not self.budgets or not all(budget > 0 for budget in self.budgets):
            raise InputError(f"budgets are {self.budgets}; give at least one, all positive")
        check_choices(self, {"cost": Cost})
        if not 0 < self.tolerance < 1:
            raise InputError(f"tolerance is {self.tolerance}; it must lie between 0 and 1")
        if self.steps < 1 or self.context < 0 or self.repair_best < 0:
            raise InputError("steps must be positive, context and repair_best not negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A shape, and what its student is worth before any training.

    Attributes:
      shape: sizes of the student.
      cost: of it.
      loss: mean cross-entropy in nats on the calibration rows.
      repaired_loss: the same of the repaired student; None where it was not measured.
    """

    shape: models.LlamaConfig
    cost: float
    loss: float
    repaired_loss: float | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        value = dataclasses.asdict(self) | {"parameters": self.shape.parameters}
        return value | {"shape": self.shape.to_json()}


def cost_of(shape: models.LlamaConfig, cost: Cost, context: int = 0) -> float:
    """What a model costs.

    "parameters" is their number. "decode_bytes" is what one decoded token reads from memory in
    bfloat16, which is what its latency hangs on where one sequence is decoded at a time: all
    matrices, of embedding and unembedding one, and the keys and values of `context` tokens.
    """
    if cost == "parameters":
        return shape.parameters
    cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * context
    return 2.0 * (shape.non_embedding_parameters + shape.vocab_size * shape.embed + cache)


def candidate_shapes(source: models.LlamaConfig, config: SearchConfig) -> list[models.LlamaConfig]:
    """All shapes of the grid that fit a budget.

    Layers, hidden channels (multiples of 8 where the source's are) and key/value heads, each with
    its query heads, come from the grid; then as many neurons (multiples of 8 likewise) as the
    budget leaves. Whatever `check_shapes` refuses is left out.

    Args:
      source: the shape to cut; the student has its rotary frequencies.
      config: what is tried.

    Raises:
      InputError: no shape fits.
    """
    found: dict[models.LlamaConfig, None] = {}
    most = cost_of(source, config.cost, config.context)
    source = dataclasses.replace(source, tied=source.tied or config.tied)
    for budget in config.budgets:
        for sizes in _grid(source, config.steps):
            shape = _with_neurons(source, sizes, budget, config)
            if shape is not None:
                found[shape] = None
    if not found:
        wanted = ", ".join(f"{budget:,.0f}" for budget in config.budgets)
        raise InputError(
            f"no shape of {config.steps} steps an axis has {wanted} {config.cost} within "
            f"{config.tolerance:.0%}; the source has {most:,.0f}"
        )
    return list(found)


def _grid(source: models.LlamaConfig, steps: int) -> Iterator[dict[str, Any]]:
    def sizes(size: int, multiple: int) -> list[int]:
        steps_of = (round(size * i / steps / multiple) * multiple for i in range(1, steps + 1))
        return sorted({value for value in steps_of if value > 0})

    each = source.heads // source.kv_heads
    for layers in sizes(source.layers, 1):
        for embed in sizes(source.embed, _multiple(source.embed)):
            for kv_heads in sizes(source.kv_heads, 1):
                yield {
                    "layers": layers,
                    "embed": embed,
                    "kv_heads": kv_heads,
                    "heads": kv_heads * each,
                }


def _multiple(size: int) -> int:
    return 8 if size % 8 == 0 else 1


def _with_neurons(
    source: models.LlamaConfig, sizes: dict[str, Any], budget: float, config: SearchConfig
) -> models.LlamaConfig | None:
    """The shape with as many neurons as the budget leaves; None if it fits none."""

    def cost(neurons: int) -> float:
        shape = dataclasses.replace(source, **sizes, mlp=neurons)
        return cost_of(shape, config.cost, config.context)

    multiple = _multiple(source.mlp)
    neurons = 1 + (budget - cost(1)) / (cost(2) - cost(1))
    least = -(-source.mlp // (_LEAST_NEURONS * multiple))
    neurons = multiple * min(max(round(neurons / multiple), least), source.mlp // multiple)
    if abs(cost(neurons) / budget - 1) > config.tolerance:
        return None
    shape = dataclasses.replace(source, **sizes, mlp=neurons)
    try:
        check_shapes(source, shape)
    except InputError:
        return None
    return shape


def search(
    model: models.Model,
    scores: Scores,
    rows: Sequence[Batch],
    config: SearchConfig,
    *,
    layer_choice: LayerChoice = "influence",
    mesh: jax.sharding.Mesh | None = None,
) -> list[Candidate]:
    """Students of every shape that fits the budget, best first.

    They are ranked by their loss on calibration rows. A student's loss is that of the full model
    with masks, so that one compiled program serves all shapes; it costs a pass of the full model
    over the rows for each.

    Args:
      model: the model to cut.
      scores: its importance.
      rows: calibration batches, of equal shape lest the program be compiled again.
      config: what is tried.
      layer_choice: which layers go, see `make_plan`.
      mesh: where rows are split; None leaves that to JAX.

    Raises:
      InputError: no shape fits, or the rows hold no token to predict.
    """
    sharding = parallel.batch_sharding(mesh) if mesh else None
    placed = [labelled(batch, sharding) for batch in rows]
    found = []
    wanted = candidate_shapes(model.config, config)
    with progress.bar("search", len(wanted), unit="shapes") as bar:
        for shape in wanted:
            plan = make_plan(scores, model.config, shape, layer_choice=layer_choice)
            masked = mask(model.params, Masks.of_plan(plan), tied=shape.tied)
            loss = _mean_loss(model.config, masked, placed)
            cost = cost_of(shape, config.cost, config.context)
            found.append(Candidate(shape=shape, cost=cost, loss=loss))
            bar.advance(note=f"loss {loss:.3f}")
    found.sort(key=lambda candidate: candidate.loss)
    for i, candidate in enumerate(found[: config.repair_best]):
        plan = make_plan(scores, model.config, candidate.shape, layer_choice=layer_choice)
        sums = grams(model, plan, rows, mesh=mesh)
        params = apply_plan(plan, repair(plan, model.params, sums, ridge=config.ridge))
        loss = _mean_loss(candidate.shape, params, placed)
        found[i] = dataclasses.replace(candidate, repaired_loss=loss)
    return found


def pareto(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other beats in both cost and loss, cheapest first."""
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda x: (x.cost, x.loss)):
        if not front or candidate.loss < front[-1].loss:
            front.append(candidate)
    return front


def _mean_loss(config: models.LlamaConfig, params: models.Params, rows: Sequence[Any]) -> float:
    totals = [batch_loss(config, params, batch) for batch in rows]
    tokens = sum(float(total.weight) for total in totals)
    if not tokens:
        raise InputError("the calibration rows hold no token to predict")
    return sum(float(total.loss) for total in totals) / tokens
