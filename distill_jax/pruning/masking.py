"""A plan as masks over the full model: one compiled program for students of every shape.

Dimensions as in `distill_jax.models`; a prime marks what is kept.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import models
from distill_jax.pruning.calibration import without_layers
from distill_jax.pruning.plan import Plan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masks:
    """What a plan keeps, as float32 arrays of the source's sizes: 1 for kept, 0 for cut.

    Attributes:
      layers: [L].
      embed: [D].
      head_dim: [C].
      mlp: [L, F].
      heads: [L, H].
      attention_scale: [L], factor of the attention norm's weight.
      mlp_scale: [L], of the feed-forward norm's.
      final_scale: [], of the last norm's.
    """

    layers: Any
    embed: Any
    head_dim: Any
    mlp: Any
    heads: Any
    attention_scale: Any
    mlp_scale: Any
    final_scale: Any

    @classmethod
    def of_plan(cls, plan: Plan) -> "Masks":
        """The masks of a plan."""
        source = plan.source
        sizes = {"layers": source.layers, "embed": source.embed, "head_dim": source.head_dim}
        shared = {name: _ones(getattr(plan, name), size) for name, size in sizes.items()}
        per_layer = {}
        for name in ("mlp", "heads"):
            mask = np.zeros((source.layers, getattr(source, name)), np.float32)
            for layer, kept in zip(plan.layers, getattr(plan, name)):
                mask[layer, kept] = 1
            per_layer[name] = mask
        scales = np.ones((2, source.layers), np.float32)
        for row, name in zip(scales, ("attention", "mlp")):
            row[plan.layers] = plan.norm_scales[name]
        return cls(
            **shared,
            **per_layer,
            attention_scale=scales[0],
            mlp_scale=scales[1],
            final_scale=np.float32(plan.norm_scales["final"][0]),
        )


def _ones(kept: np.ndarray, size: int) -> np.ndarray:
    mask = np.zeros(size, np.float32)
    mask[kept] = 1
    return mask


@functools.partial(jax.jit, static_argnames="tied")
def mask(params: models.Params, masks: Masks, *, tied: bool) -> models.Params:
    """Parameters of the source's shape that compute what the plan's student computes.

    What is cut is multiplied by zero. An RMSNorm over D channels, of which D - D' are zero, divides
    by the root of sum(x^2) / D + eps, the student's by that of sum(x^2) / D' + eps: so the whole
    residual stream is sqrt(D / D') times as large as the student's, and each norm's weight smaller
    by as much. The student's rotary frequencies must be the source's.

    Args:
      params: the full model's.
      masks: of the plan.
      tied: whether the student is tied.
    """
    loud = jnp.sqrt(masks.embed.size / jnp.sum(masks.embed))
    embed = masks.embed
    params = without_layers(params, masks.layers > 0)
    attention, mlp = params["layers"]["attention"], params["layers"]["mlp"]
    channels = embed[:, None, None] * masks.head_dim
    heads = masks.heads[:, :, None, None] * masks.head_dim[:, None]
    quiet = embed / loud
    masked = params | {
        "embedding": params["embedding"] * (embed * loud),
        "layers": {
            "attention": {
                "norm": attention["norm"] * (quiet * masks.attention_scale[:, None]),
                **{name: attention[name] * channels for name in ("query", "key", "value")},
                "output": attention["output"] * heads * (embed * loud),
            },
            "mlp": {
                "norm": mlp["norm"] * (quiet * masks.mlp_scale[:, None]),
                "gate": mlp["gate"] * embed[:, None],
                "up": mlp["up"] * embed[:, None],
                "down": mlp["down"] * masks.mlp[:, :, None] * (embed * loud),
            },
        },
        "final_norm": params["final_norm"] * (quiet * masks.final_scale),
    }
    if "unembedding" not in params:
        # The one matrix is louder at the output, too.
        masked["final_norm"] = masked["final_norm"] / loud
    elif tied:
        masked["unembedding"] = (params["embedding"] * embed).T
    return jax.tree.map(lambda new, old: new.astype(old.dtype), masked, params)
