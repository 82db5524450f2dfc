"""Sets schemes up for a number of ids, or of bytes, a token."""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from distributions import Batch

from distill_jax import teachers
from distill_jax.teachers import sampling, vocabulary


class Cost(NamedTuple):
    """Bytes of a token without its ids, of an exact id and of a sampled id."""

    token: float
    exact: float
    sampled: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Tokens to set schemes up on: their likeliest ids, and the mass of the others.

    Attributes:
      head_NK: probabilities of the likeliest ids, largest first; others are below any tau.
      tail_N: the mass of the others.
    """

    head_NK: np.ndarray
    tail_N: np.ndarray

    @classmethod
    def of(cls, batches: Iterator[Batch]) -> "Calibration":
        @jax.jit
        def reduce(teacher_NV: jax.Array) -> tuple[jax.Array, jax.Array]:
            log_probs_NV = vocabulary.log_softmax(teacher_NV)
            head_NK, ids_NK = sampling.top_k(log_probs_NV, 512)
            outside_NV = sampling.outside_top_k(log_probs_NV, head_NK, ids_NK)
            return jnp.exp(head_NK), jnp.where(outside_NV, jnp.exp(log_probs_NV), 0).sum(-1)

        parts = [reduce(teacher_NV) for teacher_NV, _ in batches]
        return cls(*(np.concatenate(part).astype(np.float64) for part in zip(*parts)))

    def threshold(self, cost: Cost, wanted: float) -> teachers.Threshold:
        """The tau at which a token's ids cost what is wanted on average."""

        def of(tau: float) -> float:
            exact_NK = self.head_NK >= tau
            sampled_N = (self.tail_N + np.where(exact_NK, 0, self.head_NK).sum(-1)) / tau
            return float((cost.exact * exact_NK.sum(-1) + cost.sampled * sampled_N).mean())

        return teachers.Threshold(tau=_halve(of, wanted, 2e-3, 1.0))

    def random(self, cost: Cost, wanted: float) -> teachers.RandomSampling:
        """The number of draws whose distinct ids cost what is wanted on average."""

        def of(draws: float) -> float:
            drawn_NK = -np.expm1(draws * np.log1p(-np.minimum(self.head_NK, 1 - 1e-12)))
            return float(cost.sampled * (drawn_NK.sum(-1) + draws * self.tail_N).mean())

        return teachers.RandomSampling(draws=round(_halve(of, wanted, 4096.0, 1.0)))


def _halve(cost, wanted: float, dear: float, cheap: float) -> float:
    """The parameter between `dear` and `cheap` that costs what is wanted."""
    low, high = math.log(dear), math.log(cheap)
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(math.exp(middle)) > wanted else (low, middle)
    return math.exp((low + high) / 2)
