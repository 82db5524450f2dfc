"""Reductions of a distribution over the vocabulary to a few ids: pure, jit-able, on the device.

Letters: N tokens, V vocabulary, G groups of S neighbouring ids, K kept ids.
"""

import functools
import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np


def row_seeds(keys: list[str], salt: str) -> np.ndarray:
    """64 random bits for every row, uint32 [rows, 2], from the row's content key alone.

    Neither the batch nor the order nor the host enters, so a row gives the same sample
    wherever it is computed. `salt` (the teacher) keeps two teachers' errors independent.
    """
    digests = [hashlib.sha256(f"{salt}:{key}".encode()).digest()[:8] for key in keys]
    return np.frombuffer(b"".join(digests), "<u4").reshape(len(keys), 2).astype(np.uint32)


def token_keys(seed: jax.Array, positions_N: jax.Array) -> jax.Array:
    """One random key for every position of the row whose seed, uint32 [2], is given.

    The generator is named, not the session's default: what is stored must not depend on it.
    """
    row_key = jax.random.wrap_key_data(seed, impl="threefry2x32")
    return jax.vmap(functools.partial(jax.random.fold_in, row_key))(positions_N)


def log_softmax_and_entropy(logits_NV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities [N, V] and entropies [N] in nats.

    Logits of -inf are allowed; where one is NaN or +inf, the entropy is NaN.
    """
    log_probs_NV = jax.nn.log_softmax(logits_NV.astype(jnp.float32), axis=-1)
    probs_NV = jnp.exp(log_probs_NV)
    # Not `probs_NV > 0`: logits that are NaN must show in the entropy.
    surprise_NV = jnp.where(probs_NV == 0, 0.0, probs_NV * log_probs_NV)
    return log_probs_NV, -surprise_NV.sum(axis=-1)


def top_k(values_NV: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest values and their ids, [N, k] each, largest first, equals by rising id.

    Exactly `jax.lax.top_k`, which sorts the whole vocabulary on TPU, in two small sorts: the
    k largest lie in the k groups whose maxima are largest. Those groups are put in order of
    their ids so that equals keep theirs.
    """
    # -0.0 equals 0.0, yet sorts below it; `outside_top_k` relies on one order.
    values_NV = jnp.where(values_NV == 0, 0, values_NV)
    vocab = values_NV.shape[-1]
    groups_NGS = _grouped(values_NV, max(1, math.isqrt(vocab // k)), fill=-jnp.inf)
    groups, size = groups_NGS.shape[1:]
    if groups <= k:
        return jax.lax.top_k(values_NV, k)
    _, chosen_NK = jax.lax.top_k(groups_NGS.max(axis=-1), k)
    chosen_NK = jnp.sort(chosen_NK, axis=-1)
    candidates_NKS = jnp.take_along_axis(groups_NGS, chosen_NK[..., None], axis=1)
    top_NK, place_NK = jax.lax.top_k(candidates_NKS.reshape(-1, k * size), k)
    group_NK = jnp.take_along_axis(chosen_NK, place_NK // size, axis=-1)
    return top_NK, (group_NK * size + place_NK % size).astype(jnp.int32)


def outside_top_k(values_NV: jax.Array, top_NK: jax.Array, ids_NK: jax.Array) -> jax.Array:
    """Which ids `top_k` left out, bool [N, V]; `top_NK` and `ids_NK` are its results.

    The order of `top_k` makes this a comparison with its last entry, where a scatter of the
    K ids would be slow on TPU.
    """
    last_N1, last_id_N1 = top_NK[:, -1:], ids_NK[:, -1:]
    tied_NV = (values_NV == last_N1) & (jnp.arange(values_NV.shape[-1]) > last_id_N1)
    return (values_NV < last_N1) | tied_NV


def draw(keys_N: jax.Array, probs_NV: jax.Array, draws: int) -> jax.Array:
    """Ids drawn with replacement from every token's distribution, int32 [N, draws].

    Inverse transform in two levels, a group and then an id inside it, each with its own
    uniform number: one cumulative sum over the vocabulary would round ids of probability
    below 6e-8 away, and there may be a hundred thousand of them.

    Args:
      keys_N: one random key for every token.
      probs_NV: probabilities; an id of probability 0 is never drawn.
      draws: how many.
    """
    groups_NGS = _grouped(probs_NV, math.isqrt(probs_NV.shape[-1]), fill=0.0)
    size = groups_NGS.shape[-1]

    def one_token(key: jax.Array, groups_GS: jax.Array) -> jax.Array:
        uniform = jax.random.uniform(key, (2, draws))
        group = _invert(groups_GS.sum(axis=-1)[None], uniform[0])
        return group * size + _invert(groups_GS[group], uniform[1])

    return jax.vmap(one_token)(keys_N, groups_NGS).astype(jnp.int32)


def count_unique(ids_ND: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Run-length form of every row: unique ids rising [N, D], counts [N, D], how many [N].

    Behind the unique ids both arrays are 0.
    """
    width = ids_ND.shape[-1]
    sorted_ND = jnp.sort(ids_ND, axis=-1)
    new_ND = jnp.diff(sorted_ND, axis=-1, prepend=-1) != 0
    slot_ND = jnp.cumsum(new_ND, axis=-1) - 1

    def one_token(ids_D: jax.Array, slot_D: jax.Array) -> tuple[jax.Array, jax.Array]:
        zeros = jnp.zeros(width, jnp.int32)
        return zeros.at[slot_D].max(ids_D), zeros.at[slot_D].add(1)

    unique_ND, counts_ND = jax.vmap(one_token)(sorted_ND, slot_ND)
    return unique_ND, counts_ND, slot_ND[:, -1] + 1


def _grouped(values_NV: jax.Array, size: int, fill: float) -> jax.Array:
    """[N, V] -> [N, G, S] with S = `size`, the last group filled up."""
    tokens, vocab = values_NV.shape
    groups = -(-vocab // size)
    padded = jnp.pad(values_NV, ((0, 0), (0, groups * size - vocab)), constant_values=fill)
    return padded.reshape(tokens, groups, size)


def _invert(mass: jax.Array, uniform: jax.Array) -> jax.Array:
    """First place at which the running sum of `mass` [draws or 1, S] passes uniform x total.

    Places without mass are struck out of the running sum: it is a parallel sum, whose
    rounding could otherwise let one be chosen. u * total < total holds in floating point
    too, since u <= 1 - 2^-23, so there always is such a place.
    """
    running = jnp.where(mass > 0, jnp.cumsum(mass, axis=-1), 0.0)
    threshold = uniform[:, None] * running.max(axis=-1, keepdims=True)
    return jnp.argmax(running > threshold, axis=-1)
