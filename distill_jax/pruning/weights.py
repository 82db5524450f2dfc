"""Scores from weights: their magnitude, and with their gradient the first-order Taylor term.

Dimensions: B rows, T time, L layers, H query heads, K kv heads, F mlp, D embed.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from distill_jax import models
from distill_jax.pruning.activations import Batch, Powers, layer_powers, power
from distill_jax.pruning.calibration import head_loss, labelled


def magnitude_scores(model: models.Model) -> dict[str, Any]:
    """Root of the summed squares of all weights that bear an axis, for each index of that axis.

    A key/value head's weights are its own and those of the query heads that it serves.
    """
    channels = np.ones((model.config.layers, model.config.embed))
    scores = _sums(model.params, model.params, config=model.config)
    return {name: jnp.sqrt(value) for name, value in scores.items()} | {
        "attention_power": channels,
        "mlp_power": channels,
        "final_power": channels[0],
    }


def taylor_scores(
    model: models.Model,
    batches: Iterable[Batch],
    batch_sharding: jax.sharding.Sharding | None,
) -> dict[str, Any]:
    """First-order Taylor scores: what the loss would change by if a part's weights went to zero.

    Of LLM-Pruner (Ma et al. 2023) the element-wise variant of first order, summed over the group:
    score = sum over the part's weights of |w g|, where g is the gradient of the mean cross-entropy
    over all calibration tokens, added up before the absolute value is taken. A part's weights are
    all those that bear its index of a logical axis; a tied embedding's gradient is that of both its
    ends; a key/value head has the weights of its query heads, too.

    Holds one float32 gradient, placed as the parameters are.

    Raises:
      InputError: the batches hold no tokens.
    """
    gradient = jax.tree.map(lambda w: jnp.zeros_like(w, jnp.float32), model.params)
    totals = gradient, Powers.zeros(model.config), jnp.zeros(())
    for batch in batches:
        totals = _accumulate(
            totals, model.params, labelled(batch, batch_sharding), config=model.config
        )
    gradient, powers, tokens = totals
    arrays = powers.relative(model.params)
    sums = _sums(model.params, gradient, config=model.config)
    return arrays | {name: value / jnp.maximum(tokens, 1) for name, value in sums.items()}


@functools.partial(jax.jit, static_argnames="config", donate_argnames="totals")
def _accumulate(
    totals: tuple[Any, Powers, Array],
    params: models.Params,
    batch: dict[str, Array],
    *,
    config: models.LlamaConfig,
) -> tuple[Any, Powers, Array]:
    """The gradient of the summed loss, the powers and the number of labels, one batch later."""
    where_BT = batch["segment_ids"] > 0

    def loss(params: models.Params) -> tuple[Array, tuple[Powers, Array]]:
        hidden_BTD, layers = models.hidden_states(
            config,
            params,
            batch["tokens"],
            batch["segment_ids"],
            remat="full",
            observe=lambda layer: layer_powers(layer, where_BT),
        )
        summed = head_loss(config, params, hidden_BTD, batch)
        powers = Powers.of(layers, power(hidden_BTD, where_BT), where_BT)
        return summed.loss, (powers, summed.weight)

    gradient, (powers, tokens) = jax.grad(loss, has_aux=True)(params)
    return jax.tree.map(lambda total, new: total + new, totals, (gradient, powers, tokens))


@functools.partial(jax.jit, static_argnames="config")
def _sums(weights: Any, factors: Any, *, config: models.LlamaConfig) -> dict[str, Array]:
    """Of |weight * factor|, over all weights that bear an index of each axis."""
    axes = models.logical_axes(config)

    def score(axis: str, *, per_layer: bool) -> Array:
        kept = ("layers", axis) if per_layer else (axis,)

        def summed(names: tuple[str, ...], weight: Array, factor: Array) -> Array:
            if not set(kept) <= set(names):
                return jnp.zeros(())
            others = tuple(i for i, name in enumerate(names) if name not in kept)
            product = weight.astype(jnp.float32) * factor.astype(jnp.float32)
            return jnp.sum(jnp.abs(product), axis=others)

        leaves = jax.tree.map(
            summed, axes, weights, factors, is_leaf=lambda x: isinstance(x, tuple)
        )
        return jax.tree.reduce(jnp.add, leaves)

    heads_LH = score("heads", per_layer=True)
    served_LK = heads_LH.reshape(config.layers, config.kv_heads, -1).sum(axis=-1)
    return {
        "layers": score("layers", per_layer=False),
        "heads": heads_LH,
        "kv_heads": score("kv_heads", per_layer=True) + served_LK,
        "mlp": score("mlp", per_layer=True),
        "embed": score("embed", per_layer=False),
    }
