"""Draws ids from a distribution over the vocabulary: pure, jit-able, on the device.

Probabilities are turned into whole numbers first (`steps`). Their sums are exact whatever is added
to what first, so a sample does not depend on how the vocabulary lies split over devices, and ids
too unlikely for a running sum in float32 keep their chance. Rounding to whole numbers is itself
random, so that an id of any probability is drawn as often as it should be.

`axis` is as in `vocabulary`. Letters: N tokens, V vocabulary (this device's share of it), G groups
of S neighbouring ids, K ids.
"""

import functools
import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.teachers import vocabulary

_GOLDEN = 0x9E3779B9
"""2^32 over the golden ratio: its multiples modulo 2^32 lie as evenly as can be."""
_DRAW_BITS = 30
"""A distribution has 2^30 steps in `draw`; half of an unsigned integer leaves room for rounding."""


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


def top_k(values_NV: jax.Array, k: int, axis: str | None = None) -> tuple[jax.Array, jax.Array]:
    """The k largest values and their ids, [N, k] each, largest first, equals by rising id.

    Exactly `jax.lax.top_k`, which sorts the whole vocabulary on TPU, in small sorts: the k largest
    lie in the k groups whose maxima are largest, and among the k largest of every device. Groups
    are put in order of their ids so that equals keep theirs.
    """
    # -0.0 equals 0.0, yet sorts below it; `outside_top_k` relies on one order.
    values_NV = jnp.where(values_NV == 0, 0, values_NV)
    vocab = values_NV.shape[-1]
    top_NK, ids_NK = _local_top_k(values_NV, min(k, vocab))
    if axis is None:
        return top_NK, ids_NK
    top_NC = vocabulary.collect(top_NK, axis)
    ids_NC = vocabulary.collect(ids_NK + vocabulary.first_id(vocab, axis), axis)
    top_NK, place_NK = jax.lax.top_k(top_NC, k)
    return top_NK, jnp.take_along_axis(ids_NC, place_NK, axis=-1)


def outside_top_k(
    values_NV: jax.Array, top_NK: jax.Array, ids_NK: jax.Array, axis: str | None = None
) -> jax.Array:
    """Which ids `top_k` left out, bool [N, V]; `top_NK` and `ids_NK` are its results.

    The order of `top_k` makes this a comparison with its last entry, where a scatter of the
    K ids would be slow on TPU.
    """
    last_N1, last_id_N1 = top_NK[:, -1:], ids_NK[:, -1:]
    vocab = values_NV.shape[-1]
    ids_V = vocabulary.first_id(vocab, axis) + jnp.arange(vocab)
    return (values_NV < last_N1) | ((values_NV == last_N1) & (ids_V > last_id_N1))


def draw(keys_N: jax.Array, probs_NV: jax.Array, draws: int, axis: str | None = None) -> jax.Array:
    """Ids drawn with replacement from every token's distribution, int32 [N, draws].

    Args:
      keys_N: one random key for every token.
      probs_NV: probabilities; an id of probability 0 is never drawn.
      draws: how many.
      axis: see the module.
    """
    bits_NK = _bits(keys_N, draws + 1)
    steps_NV = steps(probs_NV, 1 << _DRAW_BITS, bits_NK[:, 0], axis)
    total_N1 = vocabulary.total(steps_NV.sum(axis=-1, keepdims=True), axis)
    return locate(steps_NV, _high_product(bits_NK[:, 1:], total_N1), axis)


def systematic(
    keys_N: jax.Array, chances_NV: jax.Array, width: int, axis: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Ids drawn without replacement, each with its own chance (Madow 1949).

    The chances lie end to end on a line; one random offset u in [0, 1) picks the ids in which u,
    u + 1, u + 2, ... fall. So an id is picked once at most, one of chance 1 always, and the number
    of picks differs from the sum of the chances by less than 1.

    Args:
      keys_N: one random key for every token.
      chances_NV: in [0, 1], with a sum of at least 1 and at most `width` - 1, to rounding.
      width: the most ids that a token can have, below 2^16.
      axis: see the module.

    Returns:
      ids rising [N, width], 0 behind the last; how many [N].
    """
    one = 1 << (31 - width.bit_length())
    bits_NK = _bits(keys_N, 2)
    steps_NV = steps(chances_NV, one, bits_NK[:, 0], axis)
    total_N = vocabulary.total(steps_NV.sum(axis=-1), axis)
    # Below the total, too, where rounding has left less than 1 of a sum of 1.
    offset_N = jnp.minimum(bits_NK[:, 1] & (one - 1), jnp.maximum(total_N, 1) - 1)
    length_N = jnp.minimum((total_N - offset_N + (one - 1)) // one, width)
    slot_K = jnp.arange(width, dtype=jnp.uint32)
    slot_NK = jnp.minimum(slot_K, length_N[:, None] - 1)
    ids_NK = locate(steps_NV, offset_N[:, None] + slot_NK * one, axis)
    return jnp.where(slot_K < length_N[:, None], ids_NK, 0), length_N.astype(jnp.int32)


def steps(
    fractions_NV: jax.Array, one: int, bits_N: jax.Array, axis: str | None = None
) -> jax.Array:
    """Fractions in [0, 1] as whole numbers of steps, uint32 [N, V], of which `one` make 1.

    Rounded up with a chance equal to the remainder, hence right on average (to 2^-24 of a step)
    however small the fraction is. One random number a token serves all ids, spread evenly over
    them, so that the errors of neighbours cancel; 0 and 1 stay what they are.
    """
    vocab = fractions_NV.shape[-1]
    scaled_NV = fractions_NV * jnp.float32(one)  # exact: `one` is a power of two
    whole_NV = jnp.floor(scaled_NV)
    ids_V = (vocabulary.first_id(vocab, axis) + jnp.arange(vocab)).astype(jnp.uint32)
    spread_NV = bits_N[:, None] + ids_V * jnp.uint32(_GOLDEN)
    dither_NV = (spread_NV >> 8).astype(jnp.float32) * 2.0**-24
    return whole_NV.astype(jnp.uint32) + (dither_NV < scaled_NV - whole_NV)


def locate(steps_NV: jax.Array, targets_NK: jax.Array, axis: str | None = None) -> jax.Array:
    """The first id at which the running sum of the steps exceeds each target, int32 [N, K].

    In two levels, a group and then an id inside it, so that no running sum over the whole
    vocabulary is made. Sums stay below 2^32, targets (uint32) below the total.
    """
    vocab = steps_NV.shape[-1]
    groups_NGS = _grouped(steps_NV, math.isqrt(vocab), fill=0)
    size = groups_NGS.shape[-1]
    sums_NG = groups_NGS.sum(axis=-1)
    ends_NG = jnp.cumsum(sums_NG, axis=-1)
    here_N1 = ends_NG[:, -1:]
    # Below the first of this share's steps the difference wraps, and is larger than any sum.
    local_NK = targets_NK - _before(here_N1, axis)
    group_NK = _count_up_to(ends_NG[:, None], local_NK)
    start_NK = jnp.take_along_axis(ends_NG - sums_NG, group_NK, axis=-1)
    chosen_NKS = jnp.take_along_axis(groups_NGS, group_NK[..., None], axis=1)
    place_NK = _count_up_to(jnp.cumsum(chosen_NKS, axis=-1), local_NK - start_NK)
    ids_NK = vocabulary.first_id(vocab, axis) + group_NK * size + place_NK
    return vocabulary.total(jnp.where(local_NK < here_N1, ids_NK, 0), axis).astype(jnp.int32)


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


def _local_top_k(values_NV: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`top_k` of values that are all here."""
    groups_NGS = _grouped(values_NV, max(1, math.isqrt(values_NV.shape[-1] // k)), fill=-jnp.inf)
    groups, size = groups_NGS.shape[1:]
    if groups <= k:
        return jax.lax.top_k(values_NV, k)
    _, chosen_NK = jax.lax.top_k(groups_NGS.max(axis=-1), k)
    chosen_NK = jnp.sort(chosen_NK, axis=-1)
    candidates_NKS = jnp.take_along_axis(groups_NGS, chosen_NK[..., None], axis=1)
    top_NK, place_NK = jax.lax.top_k(candidates_NKS.reshape(-1, k * size), k)
    group_NK = jnp.take_along_axis(chosen_NK, place_NK // size, axis=-1)
    return top_NK, (group_NK * size + place_NK % size).astype(jnp.int32)


def _grouped(values_NV: jax.Array, size: int, fill: float) -> jax.Array:
    """[N, V] -> [N, G, S] with S = `size`, the last group filled up."""
    tokens, vocab = values_NV.shape
    groups = -(-vocab // size)
    padded = jnp.pad(values_NV, ((0, 0), (0, groups * size - vocab)), constant_values=fill)
    return padded.reshape(tokens, groups, size)


def _bits(keys_N: jax.Array, count: int) -> jax.Array:
    """Random bits, uint32 [N, count]."""
    return jax.vmap(lambda key: jax.random.bits(key, (count,), jnp.uint32))(keys_N)


def _before(totals_N1: jax.Array, axis: str | None) -> jax.Array:
    """Sum of the totals of the devices whose share of the vocabulary comes before this one's."""
    if axis is None:
        return jnp.zeros_like(totals_N1)
    all_NS = vocabulary.collect(totals_N1, axis)
    before_S = jnp.arange(all_NS.shape[-1]) < jax.lax.axis_index(axis)
    return jnp.where(before_S, all_NS, 0).sum(axis=-1, keepdims=True)


def _count_up_to(running: jax.Array, targets_NK: jax.Array) -> jax.Array:
    """How many of the running sums [N, K or 1, S] do not exceed each target; the last never counts.

    So it is a place within S even for a target beyond all of them.
    """
    return (running[..., :-1] <= targets_NK[..., None]).sum(axis=-1)


def _high_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a * b // 2^32 of uint32 arrays, less 1 at times: b scaled by the random fraction a / 2^32."""
    a_high, a_low = a >> 16, a & 0xFFFF
    b_high, b_low = b >> 16, b & 0xFFFF
    return a_high * b_high + ((a_high * b_low) >> 16) + ((a_low * b_high) >> 16)
