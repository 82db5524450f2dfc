"""The loss of every stage that trains on next tokens."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh

from distill_jax import losses, parallel
from distill_jax.models import LlamaConfig, Reading, abstract_params, hidden_states, logical_axes
from distill_jax.models.llama import Remat
from distill_jax.training.step import LossFn


def language_model_loss(
    config: LlamaConfig,
    objective: losses.Objective,
    *,
    remat: Remat = "none",
    compute_dtype: str = "float32",
    teacher_targets: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    mesh: Mesh | None = None,
) -> LossFn:
    """A loss_fn for `train` over batches of packed rows.

    Args:
      config: shape of the model that is trained.
      objective: (logits_NV, targets, step=...) -> (loss_N, terms); its targets are "labels" and
        whatever `teacher_targets` returns.
      remat: what the backward pass recomputes inside a layer.
      compute_dtype: see `loss_of_rows`.
      teacher_targets: turns a batch's "targets" (stored arrays with leading [B, T]) into a mapping
        of teacher name -> targets with the same leading axes.
      mesh: see `loss_of_rows`.
    """

    def totals(
        params: Any, batch: Mapping[str, Any], step: Array, shares: parallel.Shares | None
    ) -> losses.Totals:
        hidden_BTD = hidden_states(
            config,
            params,
            batch["tokens"],
            batch["segment_ids"],
            remat=remat,
            reading=Reading() if shares is None else Reading.of(shares),
        )
        targets = {"labels": batch["labels"]}
        if teacher_targets is not None:
            targets |= teacher_targets(batch["targets"])
        flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
        name = "embedding" if config.tied else "unembedding"
        head = losses.fused_linear if shares is None else _head(shares, name, config.tied)
        with jax.named_scope("head"):
            return head(
                objective,
                flat(hidden_BTD),
                params[name],
                jax.tree.map(flat, targets),
                flat(batch["where"]),
                transposed=config.tied,
                step=step,
            )

    return loss_of_rows(config, totals, compute_dtype=compute_dtype, mesh=mesh)


def _head(shares: parallel.Shares, name: str, tied: bool) -> Callable[..., losses.Totals]:
    """The fused head for a device's share of the unembedding."""
    split = shares.split_of(name)
    vocabulary, embed = split if tied else reversed(split)
    return functools.partial(
        losses.fused_linear_of_shares,
        tokens=shares.rows,
        embed=embed,
        vocabulary=vocabulary[0] if vocabulary else None,
    )


def loss_of_rows(
    config: LlamaConfig,
    totals: Callable[..., losses.Totals],
    *,
    compute_dtype: str = "float32",
    mesh: Mesh | None = None,
) -> LossFn:
    """A loss_fn for `train` from what is to be summed over rows.

    Args:
      config: shape of the model that is trained.
      totals: (params, batch, step, shares) -> losses.Totals of the batch. With `shares` the batch
        is that of one device, and so are the parameters: see `Reading.of`.
      compute_dtype: type of parameters and activations in the forward and backward pass; gradients
        have the parameters' own.
      mesh: where `train` runs: every device computes with rows of its own, and makes a layer's
        parameters whole when it needs them. None leaves that to the compiler.
    """
    if mesh is not None and parallel.row_shards(mesh) > 1:
        shares = parallel.Shares(mesh, logical_axes(config), abstract_params(config), compute_dtype)
        return parallel.over_rows(functools.partial(totals, shares=shares), shares)

    def loss_fn(params: Any, batch: Mapping[str, Any], step: Array) -> losses.Totals:
        low = jax.tree.map(lambda p: p.astype(compute_dtype), params)
        return totals(low, batch, step, None)

    return loss_fn
