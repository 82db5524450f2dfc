"""The loss of every stage that trains on next tokens."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh

from distill_jax import losses, parallel
from distill_jax.models import LlamaConfig, hidden_states, logical_axes
from distill_jax.models.llama import Remat
from distill_jax.training.step import LossFn


def language_model_loss(
    config: LlamaConfig,
    objective: losses.Objective,
    *,
    remat: Remat = "none",
    teacher_targets: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    mesh: Mesh | None = None,
) -> LossFn:
    """A loss_fn for `train` over batches of packed rows.

    Args:
      config: shape of the model that is trained.
      objective: (logits_NV, targets, step=...) -> (loss_N, terms); its targets are "labels" and
        whatever `teacher_targets` returns.
      remat: what the backward pass recomputes inside a layer.
      teacher_targets: turns a batch's "targets" (stored arrays with leading [B, T]) into a mapping
        of teacher name -> targets with the same leading axes.
      mesh: where `train` runs; the head is then split over it as its parameters are. None leaves
        the head to the compiler.
    """

    def loss_fn(params: Any, batch: Mapping[str, Any], step: Array) -> losses.Totals:
        hidden_BTD = hidden_states(
            config, params, batch["tokens"], batch["segment_ids"], remat=remat
        )
        targets = {"labels": batch["labels"]}
        if teacher_targets is not None:
            targets |= teacher_targets(batch["targets"])
        flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
        matrix = params["embedding" if config.tied else "unembedding"]
        with jax.named_scope("head"):
            return _head(mesh, config, matrix)(
                objective,
                flat(hidden_BTD),
                matrix,
                jax.tree.map(flat, targets),
                flat(batch["where"]),
                step=step,
            )

    return loss_fn


def _head(mesh: Mesh | None, config: LlamaConfig, matrix: Array) -> Callable[..., losses.Totals]:
    """The fused head for an unembedding, split as the parameters are."""
    if mesh is None or mesh.size == 1:
        return functools.partial(losses.fused_linear, transposed=config.tied)
    name = "embedding" if config.tied else "unembedding"
    names = logical_axes(config)[name]
    split = dict(zip(names, parallel.shardings(mesh, names, matrix).spec, strict=True))
    return functools.partial(
        losses.sharded_fused_linear,
        transposed=config.tied,
        mesh=mesh,
        tokens=parallel.ROW_AXES,
        embed=split["embed"],
        vocabulary=split["vocab"],
    )
