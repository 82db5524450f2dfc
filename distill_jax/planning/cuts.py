"""The programs of the pruning stage and of a recipe's rounds: scores, tie, repair and cut."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distill_jax import models, parallel, pruning
from distill_jax.planning.program import (
    ONE_DOCUMENT,
    Choice,
    Program,
    described,
    rows_at_a_time,
)
from distill_jax.planning.shapes import placed_layer, placed_params, teacher_shape
from distill_jax.pruning import PruneConfig, activations, steps, surgery
from distill_jax.pruning.importance import random_scores
from distill_jax.pruning.least_squares import Sums, solve
from distill_jax.pruning.prune import jit_repair, jit_tie
from distill_jax.pruning.repair import batch_grams, cut_inputs, matrix_shardings
from distill_jax.pruning.sequential import reader_arguments
from distill_jax.pruning.tying import TyingSums, batch_sums, ties
from distill_jax.recipe import Recipe

_MOVES = "it moves memory, and what it computes is not counted"


def prune_programs(recipe: Recipe, choice: Choice, mesh: Mesh) -> list[Program]:
    """Of every round's cut and the last one, in order.

    Which parts stay is data, but for the shapes: scores are drawn at random.

    Raises:
      InputError: as `stage_programs`; or a target does not fit what it is cut from.
    """
    source, notes = teacher_shape(recipe, recipe.pruned_teacher)
    own = parallel.whole_batch(recipe.evaluation.batch_rows, mesh)
    rows = rows_at_a_time(own, choice, mesh, "evaluation.batch_rows")
    programs: list[Program] = []
    cuts = {f"round {i} prune": one.prune for i, one in enumerate(recipe.rounds)}
    for name, config in (cuts | {"prune": recipe.prune}).items():
        target = dataclasses.replace(config.target, vocab_size=source.vocab_size)
        arrays: dict[str, Any] = {
            k: np.asarray(v, np.float32) for k, v in random_scores(source, 0).items()
        }
        scores = pruning.Scores(**arrays, method="", model="", rows="")
        plan = pruning.make_plan(scores, source, target, kv_choice=config.kv_choice)
        programs += _Cut(name, config, plan, mesh, rows, recipe.corpus.sequence_length, notes).all()
        source = target
    return programs


@dataclasses.dataclass(frozen=True)
class _Cut:
    """What the programs of one cut have in common."""

    name: str
    config: PruneConfig
    plan: pruning.Plan
    mesh: Mesh
    rows: int
    length: int
    notes: tuple[str, ...]

    def all(self) -> list[Program]:
        """In the order in which they run."""
        found = []
        if self.config.method == "activation":
            found.append(self._scores())
        if self.config.repair and ties(self.plan):
            found += self._ties()
        if self.config.repair and self.config.repair_order == "at_once":
            return found + self._at_once()
        jitted = surgery.jit_cut(self.plan, self.mesh)
        cut = self._program(
            "cut",
            lambda: jitted.lower(self.params),
            {"parameters": self.params},
            notes=("scores by other methods are not planned", _MOVES),
        )
        return [*found, cut, *(self._in_sequence() if self.config.repair else ())]

    @functools.cached_property
    def params(self) -> models.Params:
        return placed_params(self.plan.source, self.mesh)

    @functools.cached_property
    def tokens_BT(self) -> jax.ShapeDtypeStruct:
        sharding = parallel.batch_sharding(self.mesh)
        return described(np.zeros(self.length, np.int32), self.rows, sharding)

    def _program(
        self,
        name: str,
        lower: Callable[[], jax.stages.Lowered],
        held: dict[str, Any],
        *,
        flops: float = 0.0,
        rows: int = 0,
        tokens: int = 0,
        notes: tuple[str, ...] = (),
    ) -> Program:
        """A program of `tokens` an execution, for as many rows in all."""
        return Program(
            name=f"{self.name} {name}",
            lower=lower,
            held=held,
            mesh=self.mesh,
            rows=self.rows,
            batch=self.rows // parallel.row_shards(self.mesh),
            tokens=tokens,
            flops=flops,
            total_tokens=float(rows) * self.length if rows else None,
            notes=(*self.notes, *notes),
        )

    def _forward(
        self, name: str, lower: Callable[[], jax.stages.Lowered], held: dict[str, Any]
    ) -> Program:
        """One that runs the model over every calibration batch."""
        tokens = self.rows * self.length
        return self._program(
            name,
            lower,
            {"parameters": self.params, "batch": (self.tokens_BT, self.tokens_BT), **held},
            flops=self.plan.source.flops_per_token(self.length) * tokens,
            rows=self.config.calibration_rows,
            tokens=tokens,
            notes=(ONE_DOCUMENT,),
        )

    def _whole(self, tree: Any) -> Any:
        """Arrays of which every device has all."""
        place = NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    def _matrices(self, tree: Any) -> Any:
        """Statistics where `split_matrices` puts them."""
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            tree,
            matrix_shardings(tree, self.mesh),
        )

    def _scores(self) -> Program:
        source, how = self.plan.source, self.config.sequence_aggregation
        totals = self._whole(jax.eval_shape(lambda: activations.zeros(source)))
        return self._forward(
            "scores",
            lambda: activations.accumulate.lower(
                totals,
                self.params,
                self.tokens_BT,
                self.tokens_BT,
                config=source,
                how=how,
                batch_sharding=parallel.batch_sharding(self.mesh),
            ),
            {"sums": totals},
        )

    def _ties(self) -> list[Program]:
        source, tokens = self.plan.source, self.tokens_BT
        shapes = jax.eval_shape(batch_sums, source, self.params, tokens, tokens, None)
        sums = TyingSums(self._matrices(shapes.gram), self._whole(shapes.counts))
        jitted = jit_tie(self.plan, self.mesh)
        return [
            self._forward(
                "tie sums",
                lambda: batch_sums.lower(source, self.params, tokens, tokens, self.mesh),
                {"sums": sums},
            ),
            self._program(
                "tie",
                lambda: jitted.lower(self.params, sums),
                {"parameters": self.params, "sums": sums},
                notes=(_MOVES,),
            ),
        ]

    def _at_once(self) -> list[Program]:
        plan, tokens, names = self.plan, self.tokens_BT, cut_inputs(self.plan)
        shapes = jax.eval_shape(
            lambda params: batch_grams(params, tokens, tokens, plan.source, names, None),
            self.params,
        )
        count = self._whole(shapes.pop("tokens"))
        sums = self._matrices(shapes) | {"tokens": count}
        jitted = jit_repair(plan, self.config.ridge, self.mesh)
        return [
            self._forward(
                "repair sums",
                lambda: batch_grams.lower(
                    self.params, tokens, tokens, plan.source, names, self.mesh
                ),
                {"sums": sums},
            ),
            self._program(
                "repair cut",
                lambda: jitted.lower(self.params, sums),
                {"parameters": self.params, "sums": sums},
                notes=(_MOVES,),
            ),
        ]

    def _in_sequence(self) -> list[Program]:
        """The steps of the largest layer and projection; what lies beside them waits its turn."""
        return _Sequence(self, self.config.sequence_rows or self.config.calibration_rows).all()


@dataclasses.dataclass(frozen=True)
class _Sequence:
    """The steps of `repair_in_sequence` that need most; R rows are on their way at once."""

    cut: _Cut
    rows: int

    def all(self) -> list[Program]:
        """In the order in which they run."""
        target = self.cut.plan.target
        found = [self._full_layer(), self._heads(), self._neurons()]
        inner = max(target.heads * target.head_dim, target.mlp)
        found += [self._sums(inner), self._fit(inner, target.embed)]
        if target.embed < self.cut.plan.source.embed:
            found += [self._read_sums(), self._read()]
        return found

    def _stream(self, width: int, rows: int) -> jax.ShapeDtypeStruct:
        sharding = parallel.batch_sharding(self.cut.mesh)
        return described(np.zeros((self.cut.length, width), np.float32), rows, sharding)

    def _x(self, width: int) -> jax.ShapeDtypeStruct:
        return self._stream(width, self.cut.rows)

    @functools.cached_property
    def _held(self) -> dict[str, Any]:
        """Both models, the layers that are done, a layer of each, and four streams."""
        plan, mesh = self.cut.plan, self.cut.mesh
        batches = -(-self.rows // self.cut.rows)
        everything = functools.partial(self._stream, rows=batches * self.cut.rows)
        student = placed_params(plan.target, mesh)
        return {
            "parameters": self.cut.params,
            "batch": self.cut.tokens_BT,
            "student": (student, student["layers"]),
            "layers": (placed_layer(plan.source, mesh), placed_layer(plan.target, mesh)),
            "streams": ([everything(plan.source.embed)] * 3, everything(plan.target.embed)),
        }

    def _inputs(self, width: int) -> jax.ShapeDtypeStruct:
        """What a projection reads of all rows."""
        batches = -(-self.rows // self.cut.rows)
        return self._stream(width, batches * self.cut.rows)

    def _program(
        self,
        name: str,
        lower: Callable[[], jax.stages.Lowered],
        flops: float,
        held: dict[str, Any] | None = None,
        *,
        runs: int = 0,
    ) -> Program:
        """A step that runs for every batch of so many layers; 0: once a layer."""
        note = (
            f"a repair in sequence holds {self.rows} rows at once: prune.sequence_rows, or "
            "prune.calibration_rows"
        )
        return self.cut._program(
            f"repair {name}",
            lower,
            self._held | (held or {}),
            flops=flops,
            rows=self.rows * runs,
            tokens=self.cut.rows * self.cut.length if runs else 0,
            notes=(note, ONE_DOCUMENT) if runs else (note,),
        )

    def _layer_flops(self, config: models.LlamaConfig) -> float:
        """Forward, of one layer, of a batch."""
        one, two = (
            dataclasses.replace(config, layers=n).flops_per_token(self.cut.length) for n in (1, 2)
        )
        return (two - one) * self.cut.rows * self.cut.length

    def _full_layer(self) -> Program:
        config, mesh = self.cut.plan.source, self.cut.mesh
        layer = placed_layer(config, mesh)
        arguments = (config, layer, self._x(config.embed), self.cut.tokens_BT, mesh)
        return self._program(
            "layer",
            lambda: steps.full_layer.lower(*arguments),
            self._layer_flops(config),
            runs=config.layers,
        )

    def _heads(self) -> Program:
        config, mesh = self.cut.plan.target, self.cut.mesh
        layer = placed_layer(config, mesh)
        arguments = (config, layer, self._x(config.embed), self.cut.tokens_BT, mesh)
        reads = config.heads * config.head_dim
        matrices = config.embed * (reads + 2 * config.kv_heads * config.head_dim)
        attention = reads * self.cut.length
        return self._program(
            "heads",
            lambda: steps.heads.lower(*arguments),
            2.0 * (matrices + attention) * self.cut.rows * self.cut.length,
            {"inputs": self._inputs(reads)},
            runs=config.layers,
        )

    def _neurons(self) -> Program:
        config, mesh = self.cut.plan.target, self.cut.mesh
        arguments = (config, placed_layer(config, mesh), self._x(config.embed), mesh)
        return self._program(
            "neurons",
            lambda: steps.neurons.lower(*arguments),
            4.0 * config.embed * config.mlp * self.cut.rows * self.cut.length,
            {"inputs": self._inputs(config.mlp)},
            runs=config.layers,
        )

    def _sums(self, inner: int) -> Program:
        plan = self.cut.plan
        D, E = plan.source.embed, plan.target.embed
        start: Any = jax.ShapeDtypeStruct((inner, E), jnp.float32)
        place = parallel.shardings(self.cut.mesh, ("mlp", "embed"), start)
        start = jax.ShapeDtypeStruct(start.shape, start.dtype, sharding=place)
        arguments = (
            *(self._x(inner), start, self._x(D), self._x(E), self.cut.tokens_BT),
            *(plan.embed, self.cut.mesh),
        )
        return self._program(
            "sums",
            lambda: steps.writer_sums.lower(*arguments),
            2.0 * inner * (inner + 2 * E) * self.cut.rows * self.cut.length,
            {"inputs": self._inputs(inner), "sums": [self._moments(inner, E)] * 2},
            runs=plan.target.layers,
        )

    def _moments(self, inner: int, outer: int) -> Sums:
        shapes: Any = [jax.ShapeDtypeStruct((inner, n), jnp.float32) for n in (inner, outer)]
        return self.cut._matrices(Sums(*shapes))

    def _fit(self, inner: int, outer: int) -> Program:
        moments, mesh = self._moments(inner, outer), self.cut.mesh
        return self._program(
            "fit",
            lambda: solve.lower(moments, 1.0, mesh),
            inner**3 / 3 + 2.0 * inner**2 * outer,
            {"inputs": self._inputs(inner), "sums": [moments] * 2},
        )

    def _read_sums(self) -> Program:
        plan = self.cut.plan
        D, E = plan.source.embed, plan.target.embed
        norms = [
            placed_layer(shape, self.cut.mesh)["mlp"]["norm"]
            for shape in (plan.target, plan.source)
        ]
        arguments = (
            *(*norms, self._x(E), self._x(D), self.cut.tokens_BT),
            *(plan.embed, plan.source.norm_eps, self.cut.mesh),
        )
        return self._program(
            "read sums",
            lambda: steps.reader_sums.lower(*arguments),
            2.0 * E * (E + D) * self.cut.rows * self.cut.length,
            {"sums": [self._moments(E, D)] * 2},
            runs=2 * plan.target.layers,
        )

    def _read(self) -> Program:
        plan, mesh = self.cut.plan, self.cut.mesh
        D, E = plan.source.embed, plan.target.embed
        guess = self.cut._matrices(jax.ShapeDtypeStruct((E, D), jnp.float32))
        full, mine = (placed_layer(shape, mesh)["mlp"] for shape in (plan.source, plan.target))
        arguments = reader_arguments(plan, "mlp", 0, guess, mine, full)
        return self._program(
            "read",
            lambda: steps.read.lower(*arguments, mesh),
            4.0 * D * E * plan.target.mlp,
            {"sums": guess},
        )
