"""Fluctuation scores: how much what a weight matrix reads varies around its mean.

Dimensions: B rows, T time, N tokens, L layers, H query heads, K kv heads, C head_dim, F mlp,
D embed.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from distill_jax import models
from distill_jax.pruning.activations import (
    Batch,
    Moments,
    Powers,
    layer_powers,
    power,
    tokens_and_segments,
)

_INPUTS = ("attention_input", "heads", "mlp_input", "neurons")


def fluctuation_scores(
    model: models.Model,
    batches: Iterable[Batch],
    batch_sharding: jax.sharding.Sharding | None,
) -> dict[str, Any]:
    """FLAP's scores (An et al. 2024, 3.2): Var(x_j) |W_j|^2 for each input channel j of a matrix W.

    The variance is over all calibration tokens; |W_j|^2 sums the squares of the weights that read
    the channel. A head's score is the sum over its channels at the output projection, a neuron's
    that at the down projection. The paper scores no more than these; by the same formula a
    key/value head is the sum of its query heads, a layer the sum of its heads and neurons, and a
    channel of the residual stream the sum over all that reads it after a norm.

    Raises:
      InputError: the batches hold no tokens.
    """
    moments, powers = None, Powers.zeros(model.config)
    for batch in batches:
        tokens, segments = tokens_and_segments(batch, batch_sharding)
        new, new_powers = _observe(model.params, tokens, segments, config=model.config)
        moments = new if moments is None else _merge(moments, new)
        powers = powers + new_powers
    arrays = powers.relative(model.params)
    assert moments is not None  # there were tokens
    attention, mlp = model.params["layers"]["attention"], model.params["layers"]["mlp"]
    readers = {
        "attention_input": (attention["query"], attention["key"], attention["value"]),
        "heads": (attention["output"],),
        "mlp_input": (mlp["gate"], mlp["up"]),
        "neurons": (mlp["down"],),
    }
    found = {name: _fluctuation(moments[name], weights) for name, weights in readers.items()}
    L, H, K = model.config.layers, model.config.heads, model.config.kv_heads
    heads_LH = found["heads"].reshape(L, H, -1).sum(axis=-1)
    return arrays | {
        "layers": heads_LH.sum(axis=1) + found["neurons"].sum(axis=1),
        "heads": heads_LH,
        "kv_heads": heads_LH.reshape(L, K, -1).sum(axis=-1),
        "mlp": found["neurons"],
        "embed": (found["attention_input"] + found["mlp_input"]).sum(axis=0),
    }


@functools.partial(jax.jit, static_argnames="config")
def _observe(
    params: models.Params, tokens_BT: Array, segment_ids_BT: Array, *, config: models.LlamaConfig
) -> tuple[dict[str, Moments], Powers]:
    """Moments of every input channel over one batch's tokens, [L, channels], and the powers."""
    where_BT = segment_ids_BT > 0
    where_N = where_BT.reshape(-1).astype(jnp.float32)

    def observe(layer: dict[str, Array]) -> Any:
        inputs = {name: layer[name].astype(jnp.float32) for name in _INPUTS}
        moments = {
            name: Moments.of(x.reshape(where_N.shape[0], -1), where_N) for name, x in inputs.items()
        }
        return moments, layer_powers(layer, where_BT)

    hidden_BTD, (moments, powers) = models.hidden_states(
        config, params, tokens_BT, segment_ids_BT, observe=observe
    )
    return moments, Powers.of(powers, power(hidden_BTD, where_BT), where_BT)


@functools.partial(jax.jit, donate_argnums=0)
def _merge(total: dict[str, Moments], new: dict[str, Moments]) -> dict[str, Moments]:
    return {name: total[name].merge(new[name]) for name in total}


def _fluctuation(moments: Moments, weights: tuple[Array, ...]) -> Array:
    """Variance [L, I] times the squared norm of the rows [L, I, ...] that read each input."""
    variance_LI = moments.aggregate("variance")
    rows = (w.astype(jnp.float32).reshape(*variance_LI.shape, -1) for w in weights)
    return variance_LI * sum(
        (jnp.sum(jnp.square(row), axis=-1) for row in rows), jnp.zeros(variance_LI.shape)
    )
