"""What every scheme is, and what their ways have in common."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import losses
from distill_jax.teachers import sampling, vocabulary
from distill_jax.teachers.codec import Column

Arrays = dict[str, Any]
"""Arrays by the name of their column."""

TOKEN_COLUMNS = (
    Column(name="entropy", steps=32),
    Column(name="label_log_prob", steps=-32),
)
"""What every scheme stores of a token beside its ids, in nats."""


class Scheme(Protocol):
    """The interface of every scheme.

    `encode` returns at least "length" [N], the number of kept ids, "ids" [N, width], and of the
    teacher at the temperature asked "entropy" [N], in nats, and "label_log_prob" [N], the
    log-probability of the token's label: at most -`vocabulary.LEAST_SURPRISE`, and 0 where there
    is no label.
    """

    name: ClassVar[str]

    @property
    def width(self) -> int:
        """The most ids that a token can have."""
        ...

    def encode(
        self,
        logits_NV: jax.Array,
        labels_N: jax.Array,
        keys_N: jax.Array,
        temperature: float,
        axis: str | None = None,
    ) -> Arrays:
        """Reduces logits to arrays [N] and [N, width].

        Args:
          logits_NV: the teacher's.
          labels_N: the tokens that really came next, negative where there is none.
          keys_N: one random key for every token.
          temperature: what the logits are divided by.
          axis: inside `jax.shard_map`, the mesh axis over which the vocabulary lies split, as
            `vocabulary` says; only a few numbers a token travel over it.
        """
        ...

    def columns(self, vocab_size: int) -> tuple[Column, ...]:
        """How the arrays of `encode` are laid out in a record."""
        ...

    def unpack(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The arrays of one row for training, from its decoded columns."""
        ...

    def probabilities(self, arrays: Mapping[str, Any]) -> Any:
        """Estimated probability [..., K] of each id, 0 behind the last, of unpacked arrays."""
        ...

    def targets(
        self, arrays: Mapping[str, Any], temperature: float
    ) -> losses.TopKTargets | losses.SampledTargets:
        """What the losses take, from unpacked arrays with any leading axes."""
        ...


def token_arrays(log_probs_NV: jax.Array, labels_N: jax.Array, axis: str | None) -> Arrays:
    """What every scheme keeps of a token, [N] each, as `Scheme` says."""
    return {
        "entropy": vocabulary.entropy(log_probs_NV, axis),
        "label_log_prob": vocabulary.label_log_prob(log_probs_NV, labels_N, axis),
    }


def unpack_tokens(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same, read back."""
    return {column.name: arrays[column.name] for column in TOKEN_COLUMNS}


def head(
    logits_NV: jax.Array, log_probs_NV: jax.Array, k: int, axis: str | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """log of the mass outside the k likeliest ids [N], their log-probabilities and ids [N, K]."""
    # Chosen among the logits, which exist in memory: log-probabilities that the compiler
    # computes twice may differ in the last bit, and then the k-th counts as outside too.
    top_NK, ids_NK = sampling.top_k(logits_NV, k, axis)
    outside_NV = sampling.outside_top_k(logits_NV, top_NK, ids_NK, axis)
    # Summed over the ids outside: one minus the mass inside has no correct digit in float32 once
    # the tail is below 1e-7.
    log_tail_N = vocabulary.log_sum(jnp.where(outside_NV, log_probs_NV, -jnp.inf), axis)
    return log_tail_N, vocabulary.at(log_probs_NV, ids_NK, axis), ids_NK


def sampled_targets(arrays: Mapping[str, Any], temperature: float) -> losses.SampledTargets:
    """What the losses take of unpacked "ids", "weights" and "entropy"."""
    return losses.SampledTargets(
        ids=arrays["ids"],
        weights=arrays["weights"],
        temperature=temperature,
        entropy=arrays["entropy"],
    )
