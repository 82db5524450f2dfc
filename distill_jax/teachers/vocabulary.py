"""What needs a whole distribution: sums over a vocabulary, which may lie split over devices.

Every function takes `axis`. None: the logits are whole (or split by the compiler). A name: it is
called inside `jax.shard_map`, the logits are this device's share of the vocabulary, the shares lie
in order along that mesh axis and are equally large. Results are then the same on every device, and
what travels is a few numbers a token.

Letters: N tokens, V vocabulary (this device's share of it), K ids.
"""

import jax
import jax.numpy as jnp

LEAST_SURPRISE = 2.0**-24
"""The log-probability of a label is at most minus this, so that 0 is free to say that there is no
label."""


def total(values: jax.Array, axis: str | None) -> jax.Array:
    """Sum over the devices that share the vocabulary."""
    return values if axis is None else jax.lax.psum(values, axis)


def largest(values: jax.Array, axis: str | None) -> jax.Array:
    """Maximum over the devices that share the vocabulary."""
    return values if axis is None else jax.lax.pmax(values, axis)


def first_id(size: int, axis: str | None) -> jax.Array | int:
    """The id of this share's first entry; `size` is the share's V."""
    return 0 if axis is None else jax.lax.axis_index(axis) * size


def collect(values_NK: jax.Array, axis: str | None) -> jax.Array:
    """[N, K] of each device side by side, [N, shards * K], on all of them."""
    if axis is None:
        return values_NK
    # A sum, not an all-gather: JAX knows that its result is the same on every device.
    tokens, width = values_NK.shape
    sides = jnp.zeros((tokens, jax.lax.axis_size(axis), width), values_NK.dtype)
    sides = sides.at[:, jax.lax.axis_index(axis)].set(values_NK)
    return jax.lax.psum(sides, axis).reshape(tokens, -1)


def at(values_NV: jax.Array, ids_NK: jax.Array, axis: str | None) -> jax.Array:
    """Values at some ids, [N, K]; 0 at an id below 0."""
    vocab = values_NV.shape[-1]
    local_NK = ids_NK - first_id(vocab, axis)
    here_NK = (local_NK >= 0) & (local_NK < vocab)
    found_NK = jnp.take_along_axis(values_NV, jnp.where(here_NK, local_NK, 0), axis=-1)
    return total(jnp.where(here_NK, found_NK, 0), axis)


def log_softmax(logits_NV: jax.Array, axis: str | None = None) -> jax.Array:
    """Log-probabilities, float32 [N, V]. Logits of -inf are allowed."""
    logits_NV = logits_NV.astype(jnp.float32)
    shifted_NV = logits_NV - largest(logits_NV.max(axis=-1), axis)[:, None]
    return shifted_NV - jnp.log(total(jnp.exp(shifted_NV).sum(axis=-1), axis))[:, None]


def entropy(log_probs_NV: jax.Array, axis: str | None = None) -> jax.Array:
    """Entropies [N] in nats; NaN where a logit was NaN or +inf."""
    probs_NV = jnp.exp(log_probs_NV)
    # Not `probs_NV > 0`: logits that are NaN must show in the entropy.
    surprise_NV = jnp.where(probs_NV == 0, 0.0, probs_NV * log_probs_NV)
    return -total(surprise_NV.sum(axis=-1), axis)


def log_sum(log_values_NV: jax.Array, axis: str | None = None) -> jax.Array:
    """log of the sum of exponentials, [N]; relative to their largest, so that none is too small."""
    top_N = largest(log_values_NV.max(axis=-1), axis)
    top_N = jnp.where(jnp.isneginf(top_N), 0.0, top_N)
    return top_N + jnp.log(total(jnp.exp(log_values_NV - top_N[:, None]).sum(axis=-1), axis))


def label_log_prob(
    log_probs_NV: jax.Array, labels_N: jax.Array, axis: str | None = None
) -> jax.Array:
    """Log-probability of every token's label, [N]: below 0; 0 where the label is negative."""
    picked_N = at(log_probs_NV, labels_N[:, None], axis)[:, 0]
    return jnp.where(labels_N < 0, 0.0, jnp.minimum(picked_N, -LEAST_SURPRISE))


@jax.jit
def threshold_for(logits_NV: jax.Array, ids: float, temperature: float = 1.0) -> jax.Array:
    """The tau at which `Threshold(tau=tau)` keeps `ids` ids a token on average over some tokens.

    That average, mean_N sum_v min(1, p_v / tau), falls as tau rises, so the logarithm of tau is
    found by halving. Take some tokens of the corpus that is to be stored, not the held-out ones.

    Args:
      logits_NV: [N, V], on one device or split over several by the compiler.
      ids: the average that is wanted, from 1 to the vocabulary.
      temperature: what the logits are divided by.

    Returns:
      tau, a float32 scalar.
    """
    log_probs_NV = log_softmax(logits_NV / temperature)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        kept = jnp.exp(jnp.minimum(log_probs_NV - middle, 0.0)).sum(axis=-1).mean()
        return jnp.where(kept > ids, middle, low), jnp.where(kept > ids, high, middle)

    # 24 halvings leave 1e-6 of log tau.
    low, high = jax.lax.fori_loop(0, 24, halve, (jnp.float32(-20.0), jnp.float32(0.0)))
    return jnp.exp((low + high) / 2)
