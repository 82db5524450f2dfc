"""The likeliest ids."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import losses
from distill_jax.artifacts import InputError
from distill_jax.teachers import vocabulary
from distill_jax.teachers.codec import Column
from distill_jax.teachers.schemes.interface import (
    TOKEN_COLUMNS,
    Arrays,
    head,
    token_arrays,
    unpack_tokens,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK:
    """The exact probabilities of the k most likely ids, and the mass of all others.

    Probabilities are kept to 0.025% and without bias. The mass outside is kept too, so nothing is
    renormalised; yet which ids share it is lost, and a student trained on k = 12 falls behind
    plain cross-entropy (Anshumann et al. 2025, Sparse Logit Sampling): prefer `Threshold` for
    pre-training.

    Attributes:
      k: ids kept for every token.
    """

    k: int = 32
    name: ClassVar[str] = "top_k"

    def __post_init__(self):
        if self.k < 1:
            raise InputError(f"TopK.k: {self.k} is not a positive number of ids")

    @property
    def width(self) -> int:
        """The most ids that a token can have."""
        return self.k

    def encode(
        self,
        logits_NV: jax.Array,
        labels_N: jax.Array,
        keys_N: jax.Array,
        temperature: float,
        axis: str | None = None,
    ) -> Arrays:
        """The k likeliest ids, likeliest first, equals by rising id; `keys_N` is not used."""
        del keys_N
        log_probs_NV = vocabulary.log_softmax(logits_NV / temperature, axis)
        log_tail_N, top_NK, ids_NK = head(logits_NV, log_probs_NV, self.k, axis)
        return {
            "length": jnp.full(log_tail_N.shape, self.k, jnp.int32),
            **token_arrays(log_probs_NV, labels_N, axis),
            "log_tail": log_tail_N,
            "ids": ids_NK,
            "log_probs": top_NK,
        }

    def columns(self, vocab_size: int) -> tuple[Column, ...]:
        """Four values for every token, two for every id.

        Raises:
          InputError: k is more than the vocabulary.
        """
        if self.k > vocab_size:
            raise InputError(f"TopK.k: {self.k} ids of a vocabulary of {vocab_size}")
        return (
            Column(name="length"),
            *TOKEN_COLUMNS,
            Column(name="log_tail", steps=-4096, mean_of_exp=True),
            Column(name="ids", counted_by="length"),
            Column(
                name="log_probs", counted_by="length", steps=-4096, mean_of_exp=True, fill=-np.inf
            ),
        )

    def unpack(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """ids, log_probs [T, K], log_tail [T]; padding has all its mass in the tail.

        A token's ids are likeliest first, equals in the order of the store.
        """
        log_tail = np.where(arrays["length"] > 0, arrays["log_tail"], np.float32(0))
        likeliest_TK = np.argsort(-arrays["log_probs"], axis=-1, kind="stable")
        return {
            "ids": np.take_along_axis(arrays["ids"], likeliest_TK, axis=-1),
            "log_probs": np.take_along_axis(arrays["log_probs"], likeliest_TK, axis=-1),
            "log_tail": log_tail,
            **unpack_tokens(arrays),
        }

    def probabilities(self, arrays: Mapping[str, Any]) -> Any:
        """exp(log_probs)."""
        return np.exp(arrays["log_probs"])

    def targets(self, arrays: Mapping[str, Any], temperature: float) -> losses.TopKTargets:
        """`losses.TopKTargets` of unpacked arrays."""
        return losses.TopKTargets(
            ids=arrays["ids"],
            log_probs=arrays["log_probs"],
            log_tail=arrays["log_tail"],
            temperature=temperature,
        )
