"""Repair layer by layer: what a projection writes makes up for all that was lost before it.

The student is built from its first layer on while the full model runs beside it on the same tokens.
Each projection that writes to the residual stream is fitted, by ridge least squares, to the
difference between the full model's stream after it and the student's stream before it, on the
kept channels: with h the student's heads or neurons, x~ its stream and x the full model's stream
where the student's next part reads it,

    W = argmin_W  sum_t |x_t - x~_t - h_t W|^2 / mean(x_t^2)  +  ridge |h|^2 |W - W_cut|^2 .

So a layer is fitted to inputs that it will see, and mends the errors of those before it; where
layers are dropped, x is the stream after them, and the kept layer before does their linear part.
The weight of a token is what RMSNorm makes of it: a few tokens of a Llama are a thousand times
louder than all others. If channels of the stream go, what reads it is fitted as well: the
student's normed stream x~ gives the best linear guess of the full one, through which the full
projection is read. Llamas have no biases, so a change of the mean cannot be made up for by one.

K-prune (Park et al. 2024) rebuilds the sub-layers of encoders in this order; SparseGPT and GPTQ
(Frantar et al. 2023) do so for single weights.

Dimensions as in `distill_jax.models`; a prime marks the student's; I inputs, O outputs of a fit.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from distill_jax import models, parallel, progress
from distill_jax.artifacts import InputError, diff
from distill_jax.pruning import steps
from distill_jax.pruning.activations import Batch, tokens_and_segments
from distill_jax.pruning.least_squares import fit
from distill_jax.pruning.plan import Plan
from distill_jax.pruning.steps import Layer
from distill_jax.pruning.surgery import jit_cut, target_shardings, weight_scales


@dataclasses.dataclass
class _Rows:
    """A calibration batch on its way through both models.

    Streams are [B, T, D or D']: the full model's before a layer, between its attention and its
    MLP, and before the next layer that is kept; the student's so far.
    """

    segments: Array
    before: Array
    student: Array
    middle: Array
    after: Array


def repair_in_sequence(
    plan: Plan,
    model: models.Model,
    batches: Iterable[Batch],
    *,
    start: models.Params | None = None,
    ridge: float | None = None,
    mesh: Mesh | None = None,
) -> models.Params:
    """The student's parameters, repaired; no gradient step is taken.

    Costs about two and a half forward passes. Beside both models, devices hold of every calibration
    token three streams of the full model and one of the student, in the parameters' type, and the
    inputs of one projection, all split over the mesh.

    Args:
      plan: what is kept.
      model: the model before pruning.
      batches: calibration batches; padding is left out.
      start: parameters of the full shape that are cut, if they are not the model's own: where
        heads were merged, say. The student is fitted to the model all the same.
      ridge: the penalty, as a fraction of each input's power. None: the best for each projection,
        the plain cut among them, on every fourth batch, see `least_squares.fit`. It takes two
        batches or more.
      mesh: where rows are split and parameters live; None leaves that to JAX.

    Raises:
      InputError: the model is not of the plan's shape, the ridge is not positive, there are no
        batches, or one alone and no ridge.
    """
    changes = diff(model.config.to_json(), plan.source.to_json())
    if changes:
        raise InputError(f"not the model that the plan cuts ({'; '.join(changes)})")
    shardings = target_shardings(plan, mesh)
    cut = jit_cut(plan, mesh)
    start = model.params if start is None else start
    student = cut(start)
    rows = _first_rows(batches, model.params, student, mesh)
    check_ridge(ridge, batches=len(rows))
    work = _Repair(plan, model.params, start, ridge, mesh)
    work.pass_by(rows, range(plan.layers[0]))
    ends = [*plan.layers[1:], plan.source.layers]
    layers = []
    with progress.bar("repair", len(ends), unit="layers") as bar:
        for place, (index, end) in enumerate(zip(plan.layers, ends, strict=True)):
            for row in rows:
                row.before = row.after
            work.run_full(rows, index, range(index + 1, end))
            layer = steps.layer_at(plan.target, student["layers"], place, mesh)
            layers.append(work.layer(rows, layer, place))
            bar.advance()
    stacked = jax.jit(
        lambda layers: jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers),
        out_shardings=shardings and shardings["layers"],
    )(layers)
    return work.end(rows, student | {"layers": stacked})


def check_ridge(ridge: float | None, *, batches: int) -> None:
    """Checks that there are batches enough for a ridge, given or to be chosen.

    Raises:
      InputError: one line that says what is missing.
    """
    if ridge is not None and not ridge > 0:
        raise InputError(f"ridge is {ridge}; it must be positive")
    if not batches:
        raise InputError("there are no calibration batches for the repair")
    if batches == 1 and ridge is None:
        raise InputError(
            "one calibration batch is too few to choose the repair's ridge: give two, or a ridge"
        )


def _first_rows(
    batches: Iterable[Batch], full: models.Params, student: models.Params, mesh: Mesh | None
) -> list[_Rows]:
    sharding = parallel.batch_sharding(mesh) if mesh else None
    rows = []
    for batch in batches:
        tokens, segments = tokens_and_segments(batch, sharding)
        large, small = (steps.embed(tree["embedding"], tokens, mesh) for tree in (full, student))
        rows.append(_Rows(segments, large, small, large, large))
    return rows


@dataclasses.dataclass(frozen=True)
class _Repair:
    """What is the same in every layer, and the work on one."""

    plan: Plan
    params: models.Params
    start: models.Params
    ridge: float | None
    mesh: Mesh | None

    @property
    def cuts_stream(self) -> bool:
        """Whether channels of the residual stream go, so that what reads it is fitted too."""
        return self.plan.target.embed < self.plan.source.embed

    def pass_by(self, rows: Sequence[_Rows], dropped: Iterable[int]) -> None:
        """The full model's layers that the student lacks."""
        for index in dropped:
            layer = self._full(index)
            for row in rows:
                _, row.after = self._run(layer, row.after, row.segments)

    def run_full(self, rows: Sequence[_Rows], index: int, dropped: Iterable[int]) -> None:
        """A kept layer of the full model, and the dropped ones behind it."""
        layer = self._full(index)
        for row in rows:
            row.middle, row.after = self._run(layer, row.before, row.segments)
        self.pass_by(rows, dropped)

    def _full(self, index: int) -> Layer:
        return steps.layer_at(self.plan.source, self.params["layers"], index, self.mesh)

    def _run(self, layer: Layer, x_BTD: Array, segments_BT: Array) -> tuple[Array, Array]:
        return steps.full_layer(self.plan.source, layer, x_BTD, segments_BT, self.mesh)

    def layer(self, rows: Sequence[_Rows], layer: Layer, place: int) -> Layer:
        """Kept layer `place`, repaired; the student's streams move on through it."""
        config = self.plan.target
        layer = self._readers(rows, layer, place, "attention", [row.before for row in rows])
        heads = [steps.heads(config, layer, x.student, x.segments, self.mesh) for x in rows]
        layer = self._writer(rows, layer, "attention", heads, [row.middle for row in rows])
        layer = self._readers(rows, layer, place, "mlp", [row.middle for row in rows])
        neurons = [steps.neurons(config, layer, row.student, self.mesh) for row in rows]
        return self._writer(rows, layer, "mlp", neurons, [row.after for row in rows])

    def _writer(
        self,
        rows: Sequence[_Rows],
        layer: Layer,
        block: str,
        inputs: list[Array],
        wanted: list[Array],
    ) -> Layer:
        """What writes to the stream, fitted to what the stream lacks; the streams get it."""
        name = steps.WRITERS[block]
        old = layer[block][name]
        start_IE = old.reshape(-1, old.shape[-1])
        parts = (
            steps.writer_sums(
                x, start_IE, want, row.student, row.segments, self.plan.embed, self.mesh
            )
            for x, want, row in zip(inputs, wanted, rows, strict=True)
        )
        axes = models.logical_axes(self.plan.target)["layers"][block][name][1:]
        new = steps.change(old, fit(parts, self.ridge, self.mesh), axes, self.mesh)
        for x, row in zip(inputs, rows, strict=True):
            row.student = steps.write(row.student, x, new.reshape(start_IE.shape), self.mesh)
        return layer | {block: layer[block] | {name: new}}

    def _readers(
        self, rows: Sequence[_Rows], layer: Layer, place: int, block: str, full: list[Array]
    ) -> Layer:
        """What reads the stream after a norm, if channels of it went."""
        if not self.cuts_stream:
            return layer
        index, mine = int(self.plan.layers[place]), layer[block]
        full_norm = self.params["layers"][block]["norm"][index]
        guess_ED = self._guess(rows, mine["norm"], full_norm, full)
        start = steps.layer_at(self.plan.source, self.start["layers"], index, self.mesh)[block]
        arguments = reader_arguments(self.plan, block, place, guess_ED, mine, start)
        norm, readers = steps.read(*arguments, self.mesh)
        return layer | {block: mine | {"norm": norm} | readers}

    def _guess(
        self, rows: Sequence[_Rows], norm_E: Array, full_norm_D: Array, full: list[Array]
    ) -> Array:
        """The full model's normed stream as a linear map [D', D] of the student's."""
        eps = self.plan.source.norm_eps
        parts = (
            steps.reader_sums(
                norm_E, full_norm_D, row.student, x, row.segments, self.plan.embed, eps, self.mesh
            )
            for x, row in zip(full, rows, strict=True)
        )
        kept = jax.nn.one_hot(self.plan.embed, self.plan.source.embed)
        return kept + fit(parts, self.ridge, self.mesh)

    def end(self, rows: Sequence[_Rows], student: models.Params) -> models.Params:
        """The unembedding, if it is a matrix of its own and channels went."""
        if not self.cuts_stream or self.plan.target.tied:
            return student
        guess_ED = self._guess(
            rows, student["final_norm"], self.params["final_norm"], [row.after for row in rows]
        )
        norm, found = steps.read(
            guess_ED,
            student["final_norm"],
            {"unembedding": student["unembedding"]},
            {"unembedding": self.start["unembedding"]},
            {},
            {},
            (("unembedding", ("embed", "vocab")),),
            self.mesh,
        )
        return student | {"final_norm": norm} | found


def reader_arguments(
    plan: Plan, block: str, place: int, guess_ED: Array, mine: Any, full: Any
) -> tuple[Any, ...]:
    """What `steps.read` is called with, but for the mesh, for a block of kept layer `place`."""
    names, scales = steps.READERS[block], weight_scales(plan)
    axes = models.logical_axes(plan.source)["layers"][block]
    kept = {name: getattr(plan, name)[place] for name in ("heads", "kv_heads", "mlp")}
    paths = {name: ("layers", block, name) for name in names}
    return (
        guess_ED,
        mine["norm"],
        {name: mine[name] for name in names},
        {name: full[name] for name in names},
        kept | {"head_dim": plan.head_dim},
        {name: scales[path] for name, path in paths.items() if path in scales},
        tuple((name, axes[name][1:]) for name in names),
    )
