"""Ids drawn with replacement."""

import dataclasses
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
    sampled_targets,
    token_arrays,
    unpack_tokens,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomSampling:
    """Ids drawn with replacement from the teacher, weighted by how often each was drawn.

    The weight count/draws of an id has its probability as expectation, so the expected
    gradient is that of the whole distribution (Anshumann et al. 2025, Sparse Logit
    Sampling: Accelerating Knowledge Distillation in LLMs). 50 draws leave about 12 ids.

    Attributes:
      draws: draws for every token.
    """

    draws: int = 50
    name: ClassVar[str] = "random_sampling"

    def __post_init__(self):
        if self.draws < 1:
            raise InputError(f"RandomSampling.draws: {self.draws} is not a positive number")

    @property
    def width(self) -> int:
        """The most ids that a token can have."""
        return self.draws

    def encode(
        self,
        logits_NV: jax.Array,
        labels_N: jax.Array,
        keys_N: jax.Array,
        temperature: float,
        axis: str | None = None,
    ) -> Arrays:
        """The unique ids drawn, rising, with their counts."""
        log_probs_NV = vocabulary.log_softmax(logits_NV / temperature, axis)
        drawn_ND = sampling.draw(keys_N, jnp.exp(log_probs_NV), self.draws, axis)
        ids_NK, counts_NK, length_N = sampling.count_unique(drawn_ND)
        return {
            "length": length_N,
            **token_arrays(log_probs_NV, labels_N, axis),
            "ids": ids_NK,
            "counts": counts_NK,
        }

    def columns(self, vocab_size: int) -> tuple[Column, ...]:
        """Three values for every token, two for every id."""
        return (
            Column(name="length"),
            *TOKEN_COLUMNS,
            Column(name="ids", counted_by="length"),
            Column(name="counts", counted_by="length"),
        )

    def unpack(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """ids, weights [T, K]; weight 0 behind a token's last id."""
        return {
            "ids": arrays["ids"],
            "weights": arrays["counts"].astype(np.float32) / np.float32(self.draws),
            **unpack_tokens(arrays),
        }

    def probabilities(self, arrays: Mapping[str, Any]) -> Any:
        """The weights themselves."""
        return arrays["weights"]

    def targets(self, arrays: Mapping[str, Any], temperature: float) -> losses.SampledTargets:
        """`losses.SampledTargets` of unpacked arrays."""
        return sampled_targets(arrays, temperature)
