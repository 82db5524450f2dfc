"""The loss of every stage that trains on next tokens."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh

from distill_jax import losses, parallel
from distill_jax.artifacts import InputError
from distill_jax.models import LlamaConfig, Reading, abstract_params, hidden_states, logical_axes
from distill_jax.models.llama import Remat
from distill_jax.models.times import Times
from distill_jax.training.step import LossFn


def language_model_loss(
    config: LlamaConfig,
    objective: losses.Objective,
    *,
    remat: Remat = "none",
    compute_dtype: str = "float32",
    teacher_targets: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    live: Mapping[str, LlamaConfig] | None = None,
    mesh: Mesh | None = None,
) -> LossFn:
    """A loss_fn for `train` over batches of packed rows.

    Args:
      config: shape of the model that is trained.
      objective: (logits_NV, targets, step=...) -> (loss_N, terms); its targets are "labels",
        whatever `teacher_targets` returns, and the logits of live teachers.
      remat: what the backward pass recomputes inside a layer.
      compute_dtype: see `loss_of_rows`.
      teacher_targets: turns a batch's "targets" (stored arrays with leading [B, T]) into a mapping
        of teacher name -> targets with the same leading axes.
      live: teacher name -> shape of teachers that read every batch beside the model. Their
        parameters, {name: params}, are a fourth argument of the loss_fn, which `train` gives it.
        No more of their logits exist at a time than of the model's own.
      mesh: see `loss_of_rows`. Devices along its axis "sequence" share rows; `train` must know.

    Raises:
      InputError: a live teacher's vocabulary is another one; of the loss_fn, the parameters are not
        those of the teachers in `live`.
    """
    live = live or {}
    for name, shape in live.items():
        if shape.vocab_size != config.vocab_size:
            raise InputError(
                f"teacher {name}: has {shape.vocab_size} token ids, the student {config.vocab_size}"
            )
    shares = {name: shares_of(shape, compute_dtype, mesh) for name, shape in live.items()}
    times = _times(mesh)
    teachers = {name: _Reader(shape, shares[name], times) for name, shape in live.items()}

    def totals(
        params: Any,
        batch: Mapping[str, Any],
        step: Array,
        frozen: Any = None,
        *,
        shares: parallel.Shares | None,
    ) -> losses.Totals:
        own = {key: batch[key] for key in ("labels", "where", "targets") if key in batch}
        own = times.own(own) if times else own
        targets = {"labels": own["labels"]}
        if teacher_targets is not None:
            targets |= teacher_targets(own["targets"])
        targets = jax.tree.map(_flat, targets)
        for name, teacher in teachers.items():
            targets[name] = teacher.targets(frozen[name], batch)
        student = _Reader(config, shares, times)
        hidden_ND = student.hidden(params, batch, remat)
        with jax.named_scope("head"):
            return student.head(
                objective,
                hidden_ND,
                params[student.unembedding],
                targets,
                _flat(own["where"]),
                transposed=config.tied,
                step=step,
                least_chunk=parallel.least_chunk(mesh),
            )

    of_rows = loss_of_rows(
        config,
        totals,
        compute_dtype=compute_dtype,
        mesh=mesh,
        frozen=shares,
        split_time=times is not None,
    )

    def loss_fn(params: Any, batch: Mapping[str, Any], step: Array, *frozen: Any) -> losses.Totals:
        given = sorted(name for trees in frozen for name in trees)
        if given != sorted(live):
            raise InputError(f"teachers: {given} are given, the loss reads {sorted(live)}")
        return of_rows(params, batch, step, *frozen)

    return loss_fn


def loss_of_rows(
    config: LlamaConfig,
    totals: Callable[..., losses.Totals],
    *,
    compute_dtype: str = "float32",
    mesh: Mesh | None = None,
    frozen: Mapping[str, parallel.Shares | None] | None = None,
    split_time: bool = False,
) -> LossFn:
    """A loss_fn for `train` from what is to be summed over rows.

    Args:
      config: shape of the model that is trained.
      totals: (params, batch, step, shares=...) -> losses.Totals of the batch. With `shares` the
        batch is that of one device, and so are the parameters: see `Reading.of`.
      compute_dtype: type of parameters and activations in the forward and backward pass; gradients
        have the parameters' own.
      mesh: where `train` runs: every device computes with rows of its own, and makes a layer's
        parameters whole when it needs them. None leaves that to the compiler.
      frozen: other models' names, and `shares_of` them: totals and the loss_fn get their
        parameters, {name: params}, after the step. They have no gradient.
      split_time: see `parallel.over_rows`.
    """
    shares = shares_of(config, compute_dtype, mesh)
    if shares is not None:
        specs = {name: its.specs for name, its in (frozen or {}).items() if its is not None}
        of_rows = functools.partial(totals, shares=shares)
        given = [specs] if specs else []
        return parallel.over_rows(of_rows, shares, *given, split_time=split_time)

    def loss_fn(params: Any, batch: Mapping[str, Any], step: Array, *others: Any) -> losses.Totals:
        low, others = jax.tree.map(lambda p: p.astype(compute_dtype), (params, others))
        return totals(low, batch, step, *others, shares=None)

    return loss_fn


def values_of_rows(
    config: LlamaConfig,
    values: Callable[[Any, Any, Reading], Array],
    *,
    compute_dtype: str = "float32",
    mesh: Mesh | None = None,
) -> Callable[[Any, Mapping[str, Any]], Array]:
    """A jitted function of parameters and a batch that gives something of every row.

    Args:
      config: the model's shape.
      values: (params, batch, reading) -> [B, ...] of the batch's B rows.
      compute_dtype: type of parameters and activations.
      mesh: where the parameters lie: every device computes with rows of its own, as in
        `loss_of_rows`, and B must be a multiple of their number. None leaves that to the compiler.
    """
    shares = shares_of(config, compute_dtype, mesh)
    if shares is not None:
        reading = Reading.of(shares)
        return jax.jit(
            parallel.map_rows(lambda params, batch: values(params, batch, reading), shares)
        )
    return jax.jit(
        lambda params, batch: values(
            jax.tree.map(lambda p: p.astype(compute_dtype), params), batch, Reading()
        )
    )


def shares_of(config: LlamaConfig, dtype: str, mesh: Mesh | None) -> parallel.Shares | None:
    """How a model lies where every device computes with rows of its own; None: it does not."""
    if mesh is None or parallel.row_shards(mesh) == 1:
        return None
    return parallel.Shares(mesh, logical_axes(config), abstract_params(config), dtype)


def _times(mesh: Mesh | None) -> Times | None:
    """How devices share rows; None: they do not."""
    shards = 1 if mesh is None else parallel.time_shards(mesh)
    return Times(parallel.TIME_AXIS, shards) if shards > 1 else None


@dataclasses.dataclass(frozen=True)
class _Reader:
    """A model as it reads a batch inside of the step.

    Attributes:
      config: its shape.
      shares: how its parameters lie, if devices hold shares of them and rows of their own.
      times: those of a device, if several share rows.
    """

    config: LlamaConfig
    shares: parallel.Shares | None
    times: Times | None

    @property
    def unembedding(self) -> str:
        """The parameter that turns hidden states into logits."""
        return "embedding" if self.config.tied else "unembedding"

    @property
    def split(self) -> tuple[tuple[str, ...], ...]:
        """Mesh axes over which its vocabulary and its channels are split."""
        assert self.shares is not None
        split = self.shares.split_of(self.unembedding)
        return split if self.config.tied else split[::-1]

    @property
    def head(self) -> Callable[..., losses.Totals]:
        """The fused head."""
        if self.shares is None:
            return losses.fused_linear
        vocabulary, embed = self.split
        return functools.partial(
            losses.fused_linear_of_shares,
            tokens=self.shares.rows,
            embed=embed,
            vocabulary=vocabulary[0] if vocabulary else None,
        )

    def hidden(self, params: Any, batch: Mapping[str, Any], remat: Remat = "none") -> Array:
        """Final hidden states [N, D] of a batch's tokens."""
        hidden_BTD = hidden_states(
            self.config,
            params,
            batch["tokens"],
            batch["segment_ids"],
            remat=remat,
            reading=Reading() if self.shares is None else Reading.of(self.shares),
            times=self.times,
        )
        return _flat(hidden_BTD)

    def targets(self, params: Any, batch: Mapping[str, Any]) -> losses.LiveTargets:
        """What it says of a batch's tokens as a teacher."""
        return losses.LiveTargets(
            self.hidden(params, batch),
            params[self.unembedding],
            transposed=self.config.tied,
            embed=None if self.shares is None else self.split[1],
        )


def _flat(array: Array) -> Array:
    """[B, T, ...] -> [N, ...]."""
    return array.reshape(-1, *array.shape[2:])
