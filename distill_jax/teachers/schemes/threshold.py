"""The likely ids as they are, the unlikely ones by chance."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import losses
from distill_jax.artifacts import InputError
from distill_jax.teachers import sampling, vocabulary
from distill_jax.teachers.codec import Column
from distill_jax.teachers.schemes.interface import (
    TOKEN_COLUMNS,
    Arrays,
    head,
    sampled_targets,
    token_arrays,
    unpack_tokens,
)

_TAU_STEPS = 1024
"""A token's own log tau lies on a grid of so many steps in a nat."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Threshold:
    """Ids of probability tau or more kept as they are, the others sampled at weight tau.

    An id of probability p < tau is kept with probability p / tau, so its weight has p as
    expectation, and among all unbiased ways to keep as many ids on average none has a smaller
    squared error (threshold sampling: Duffield, Lund, Thorup 2007, Priority sampling for
    estimation of arbitrary subset sums; systematic, so the number of ids hardly varies). One tau
    for all tokens spends the ids where they are worth most: few on easy tokens, never more than
    1 / tau + 1 on hard ones. `threshold_for` finds the tau of a wanted mean.

    Give one of the two.

    Attributes:
      tau: the probability, for every token.
      ids: K ids for every token instead, whose own tau, with sum_v min(1, p_v / tau) = K, is then
        stored.
    """

    tau: float | None = None
    ids: int | None = None
    name: ClassVar[str] = "threshold"

    def __post_init__(self):
        if (self.tau is None) == (self.ids is None):
            raise InputError(f"Threshold: give tau ({self.tau}) or ids ({self.ids}), one of them")
        if self.tau is not None and not 1e-4 <= self.tau <= 1:
            raise InputError(f"Threshold.tau: {self.tau} is not a probability from 0.0001 to 1")
        if self.ids is not None and not 1 <= self.ids <= 10_000:
            raise InputError(f"Threshold.ids: {self.ids} is not a number of ids from 1 to 10000")

    @property
    def width(self) -> int:
        """The most ids that a token can have."""
        if self.tau is None:
            return (self.ids or 0) + 1
        # Probabilities in float32 may add up to a little more than 1.
        return math.floor(1.0001 / self.tau) + 1

    def encode(
        self,
        logits_NV: jax.Array,
        labels_N: jax.Array,
        keys_N: jax.Array,
        temperature: float,
        axis: str | None = None,
    ) -> Arrays:
        """The exact ids, rising, then the sampled ones, rising; log_probs count for the former."""
        log_probs_NV = vocabulary.log_softmax(logits_NV / temperature, axis)
        log_tau_N = self._log_tau(logits_NV, log_probs_NV, axis)
        chances_NV = jnp.exp(jnp.minimum(log_probs_NV - log_tau_N[:, None], 0.0))
        ids_NK, length_N = sampling.systematic(keys_N, chances_NV, self.width, axis)
        log_probs_NK = vocabulary.at(log_probs_NV, ids_NK, axis)
        kept_NK = jnp.arange(self.width) < length_N[:, None]
        exact_NK = kept_NK & (log_probs_NK >= log_tau_N[:, None])
        order_NK = jnp.argsort(jnp.where(exact_NK, 0, jnp.where(kept_NK, 1, 2)), axis=-1)
        arrays = {
            "length": length_N,
            "exact": exact_NK.sum(axis=-1),
            **token_arrays(log_probs_NV, labels_N, axis),
            "ids": jnp.take_along_axis(ids_NK, order_NK, axis=-1),
            "log_probs": jnp.take_along_axis(log_probs_NK, order_NK, axis=-1),
        }
        return arrays if self.ids is None else arrays | {"log_tau": log_tau_N}

    def columns(self, vocab_size: int) -> tuple[Column, ...]:
        """Four values for every token, or five, one for every id and one for every exact id.

        Raises:
          InputError: more ids than the vocabulary.
        """
        if self.ids is not None and self.ids > vocab_size:
            raise InputError(f"Threshold.ids: {self.ids} ids of a vocabulary of {vocab_size}")
        own_tau = () if self.ids is None else (Column(name="log_tau", steps=-_TAU_STEPS),)
        return (
            Column(name="length"),
            Column(name="exact"),
            *TOKEN_COLUMNS,
            *own_tau,
            Column(name="ids", counted_by="length"),
            Column(name="log_probs", counted_by="exact", steps=-64, mean_of_exp=True, fill=-np.inf),
        )

    def unpack(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """ids, weights [T, K]; weight 0 behind a token's last id."""
        slot_K = np.arange(arrays["ids"].shape[1])
        tau = np.float32(self.tau) if self.ids is None else np.exp(arrays["log_tau"])[:, None]
        sampled = np.where(slot_K < arrays["length"][:, None], tau, np.float32(0))
        exact = slot_K < arrays["exact"][:, None]
        return {
            "ids": arrays["ids"],
            "weights": np.where(exact, np.exp(arrays["log_probs"]), sampled),
            **unpack_tokens(arrays),
        }

    def probabilities(self, arrays: Mapping[str, Any]) -> Any:
        """The weights themselves."""
        return arrays["weights"]

    def targets(self, arrays: Mapping[str, Any], temperature: float) -> losses.SampledTargets:
        """`losses.SampledTargets` of unpacked arrays."""
        return sampled_targets(arrays, temperature)

    def _log_tau(
        self, logits_NV: jax.Array, log_probs_NV: jax.Array, axis: str | None
    ) -> jax.Array:
        """log tau of every token, [N]."""
        if self.ids is None:
            assert self.tau is not None  # one of the two is given
            return jnp.full(len(logits_NV), math.log(self.tau), jnp.float32)
        log_tail_N, top_NK, _ = head(logits_NV, log_probs_NV, self.ids, axis)
        probs_NK = jnp.exp(top_NK)
        # With the h likeliest exact, tau is the others' mass over K - h: rest_NK[:, h] / (K - h).
        # That falls as long as the next id is larger than it, so the least of them is right.
        rest_NK = jnp.exp(log_tail_N)[:, None] + jnp.cumsum(probs_NK[:, ::-1], axis=-1)[:, ::-1]
        tau_N = (rest_NK / (self.ids - jnp.arange(self.ids))).min(axis=-1)
        # Where fewer than K ids are possible at all, each of them is kept.
        least_N = jnp.where(probs_NK > 0, probs_NK, 1.0).min(axis=-1)
        log_tau_N = jnp.log(jnp.maximum(tau_N, least_N))
        # What is stored must be what was used. Rounding is upwards, which keeps no more than K ids.
        return jnp.minimum(jnp.ceil(log_tau_N * _TAU_STEPS) / _TAU_STEPS, 0.0)
