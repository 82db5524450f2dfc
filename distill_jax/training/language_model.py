"""The loss of every stage that trains on next tokens."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import Array

from distill_jax import losses
from distill_jax.models import LlamaConfig, hidden_states, unembedding
from distill_jax.models.llama import Remat
from distill_jax.training.step import LossFn


def language_model_loss(
    config: LlamaConfig,
    objective: losses.Objective,
    *,
    remat: Remat = "none",
    teacher_targets: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> LossFn:
    """A loss_fn for `train` over batches of packed rows.

    Args:
      config: shape of the model that is trained.
      objective: (logits_NV, targets, step=...) -> (loss_N, terms); its targets are "labels" and
        whatever `teacher_targets` returns.
      remat: what the backward pass recomputes inside a layer.
      teacher_targets: turns a batch's "targets" (stored arrays with leading [B, T]) into a mapping
        of teacher name -> targets with the same leading axes.
    """

    def loss_fn(params: Any, batch: Mapping[str, Any], step: Array) -> losses.Totals:
        hidden_BTD = hidden_states(
            config, params, batch["tokens"], batch["segment_ids"], remat=remat
        )
        targets = {"labels": batch["labels"]}
        if teacher_targets is not None:
            targets |= teacher_targets(batch["targets"])
        flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
        return losses.fused_linear(
            objective,
            flat(hidden_BTD),
            unembedding(params),
            jax.tree.map(flat, targets),
            flat(batch["where"]),
            step=step,
        )

    return loss_fn
