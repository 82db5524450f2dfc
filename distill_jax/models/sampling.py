"""How the next token is drawn.

Dimensions: B rows, V vocab.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array

from distill_jax.artifacts import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn; the cuts are made one after another, in this order.

    Attributes:
      temperature: logits are divided by it; 0 takes the most probable token.
      top_k: draw only from this many most probable tokens; None: from all.
      top_p: then only from the fewest tokens that hold this share of the probability (nucleus
        sampling, Holtzman et al. 2020); None: from all.
      min_p: then only from tokens at least this many times as probable as the most probable one
        (Nguyen et al. 2025); None: from all.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise InputError(f"Sampling.temperature is {self.temperature}; it must be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"Sampling.top_k is {self.top_k}; it must be positive")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise InputError(f"Sampling.{name} is {value}; it must be in (0, 1]")


def draw(logits_BV: Array, keys_B: Array, sampling: Sampling) -> Array:
    """One token id for every row, by the Gumbel-max trick with the row's own key."""
    if sampling.temperature == 0:
        return _argmax(logits_BV)
    logits_BV = truncate(logits_BV / sampling.temperature, sampling)
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(keys_B)
    return _argmax(logits_BV + noise_BV)


def truncate(logits_BV: Array, sampling: Sampling) -> Array:
    """Logits with -inf in place of what is cut off; ties with the last that stays stay."""
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        least = jax.lax.top_k(logits_BV, sampling.top_k)[0][..., -1:]
        logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)
    if sampling.top_p is not None and sampling.top_p < 1:
        logits_BV = _nucleus(logits_BV, sampling.top_p)
    if sampling.min_p is not None:
        least = jnp.max(logits_BV, axis=-1, keepdims=True) + math.log(sampling.min_p)
        logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)
    return logits_BV


def _nucleus(logits_BV: Array, top_p: float) -> Array:
    """Keeps a token if the tokens above it hold less than `top_p`.

    The least logit that stays is found by bisection over the floats, which takes 32 sums: sorting
    a vocabulary takes ten times as long.
    """
    share_BV = jax.nn.softmax(logits_BV)
    rank_BV = _ordered(logits_BV)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        """`high` stays, if it is anything's rank; `low` does not."""
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)
        above = jnp.sum(jnp.where(rank_BV > middle, share_BV, 0), axis=-1, keepdims=True)
        stays = above < top_p
        return jnp.where(stays, low, middle), jnp.where(stays, middle, high)

    low = jnp.min(rank_BV, axis=-1, keepdims=True) - 1
    high = jnp.max(rank_BV, axis=-1, keepdims=True)
    _, least = jax.lax.fori_loop(0, 32, halve, (low, high))
    return jnp.where(rank_BV < least, -jnp.inf, logits_BV)


def _ordered(values: Array) -> Array:
    """Integers in the order of float32 `values`; all that lie between occur, and no others."""
    values = jnp.where(values == 0, 0.0, values)  # there are two zeros
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)
    return bits ^ ((bits >> 31) & jnp.int32(2**31 - 1))


def _argmax(values_BV: Array) -> Array:
    """The first index of the largest; in two plain reductions, which XLA's CPU vectorises."""
    largest = jnp.max(values_BV, axis=-1, keepdims=True)
    index_V = jnp.arange(values_BV.shape[-1], dtype=jnp.int32)
    last = values_BV.shape[-1] - 1
    return jnp.min(jnp.where(values_BV == largest, index_V, last), axis=-1)
