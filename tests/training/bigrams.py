"""A loss that compiles at once, for tests of what goes on around it."""

import jax.numpy as jnp

from distill_jax import losses


def bigram_loss(params, batch, step):
    """Next tokens from one token each; of the parameters only two have a say."""
    hidden_BTD = params["embedding"][batch["tokens"]] * params["final_norm"]
    logits_BTV = jnp.einsum("BTD,VD->BTV", hidden_BTD, params["embedding"])
    loss_BT = losses.cross_entropy(logits_BTV, batch["labels"])
    return losses.reduce(loss_BT, {}, batch["where"])
