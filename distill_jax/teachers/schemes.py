"""What of a teacher's distribution is kept: one frozen config for each way to sample it.

A scheme has two halves. `encode` runs on the device inside the teacher's jitted forward
pass and reduces logits [N, V] to a few arrays [N] and [N, width]. `columns` says how those
are stored, and `unpack` turns what comes back from disk into what training takes.

Letters: N tokens, V vocabulary, K kept ids.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import losses
from distill_jax.artifacts import InputError
from distill_jax.teachers import sampling
from distill_jax.teachers.codec import Column, unsigned

Arrays = dict[str, Any]
"""Arrays by the name of their column."""


class Scheme(Protocol):
    """The interface of every scheme.

    `encode` returns at least "length" [N], the number of kept ids, "ids" [N, width], and
    "entropy" [N], the teacher's entropy in nats at the temperature asked.
    """

    name: ClassVar[str]

    @property
    def width(self) -> int:
        """The most ids that a token can have."""
        ...

    def encode(self, logits_NV: jax.Array, keys_N: jax.Array, temperature: float) -> Arrays:
        """Reduces logits, with one random key per token, to arrays [N] and [N, width]."""
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK:
    """The exact probabilities of the k most likely ids, and the mass of all others.

    Log-probabilities are kept as float16, whose error p |log p| 2^-12 in a probability is
    never over 1e-4. The mass outside is kept too, so nothing is renormalised; yet which ids
    share it is lost, and a student trained on k = 12 falls behind plain cross-entropy
    (Anshumann et al. 2025, Sparse Logit Sampling): prefer `RandomSampling` for pre-training.

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

    def encode(self, logits_NV: jax.Array, keys_N: jax.Array, temperature: float) -> Arrays:
        """The k likeliest ids, likeliest first, equals by rising id; `keys_N` is not used."""
        del keys_N
        log_probs_NV, entropy_N = sampling.log_softmax_and_entropy(logits_NV / temperature)
        # Chosen among the logits, which exist in memory: log-probabilities that the compiler
        # computes twice may differ in the last bit, and then the k-th counts as outside too.
        top_NK, ids_NK = sampling.top_k(logits_NV, self.k)
        outside_NV = sampling.outside_top_k(logits_NV, top_NK, ids_NK)
        # Summed over the ids outside: one minus the mass inside has no correct digit in
        # float32 once the tail is below 1e-7.
        log_tail_N = jax.nn.logsumexp(jnp.where(outside_NV, log_probs_NV, -jnp.inf), axis=-1)
        return {
            "length": jnp.full(entropy_N.shape, self.k, jnp.int32),
            "entropy": entropy_N,
            "log_tail": log_tail_N,
            "ids": ids_NK,
            "log_probs": jnp.take_along_axis(log_probs_NV, ids_NK, axis=-1),
        }

    def columns(self, vocab_size: int) -> tuple[Column, ...]:
        """length, entropy and log_tail for every token; ids and log_probs for every id.

        Raises:
          InputError: k is more than the vocabulary.
        """
        if self.k > vocab_size:
            raise InputError(f"TopK.k: {self.k} ids of a vocabulary of {vocab_size}")
        return (
            Column(name="length", dtype=unsigned(self.k)),
            Column(name="entropy", dtype="float16"),
            Column(name="log_tail", dtype="float16"),
            Column(name="ids", dtype=unsigned(vocab_size - 1), counted_by="length"),
            Column(name="log_probs", dtype="float16", counted_by="length", fill=-np.inf),
        )

    def unpack(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """ids, log_probs [T, K], log_tail, entropy [T]; padding has all its mass in the tail."""
        log_tail = np.where(arrays["length"] > 0, arrays["log_tail"], np.float32(0))
        return {
            "ids": arrays["ids"].astype(np.int32),
            "log_probs": arrays["log_probs"],
            "log_tail": log_tail,
            "entropy": arrays["entropy"],
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

    def encode(self, logits_NV: jax.Array, keys_N: jax.Array, temperature: float) -> Arrays:
        """The unique ids drawn, rising, with their counts."""
        log_probs_NV, entropy_N = sampling.log_softmax_and_entropy(logits_NV / temperature)
        drawn_ND = sampling.draw(keys_N, jnp.exp(log_probs_NV), self.draws)
        ids_NK, counts_NK, length_N = sampling.count_unique(drawn_ND)
        return {"length": length_N, "entropy": entropy_N, "ids": ids_NK, "counts": counts_NK}

    def columns(self, vocab_size: int) -> tuple[Column, ...]:
        """length and entropy for every token; ids and counts for every id."""
        return (
            Column(name="length", dtype=unsigned(self.draws)),
            Column(name="entropy", dtype="float16"),
            Column(name="ids", dtype=unsigned(vocab_size - 1), counted_by="length"),
            Column(name="counts", dtype=unsigned(self.draws), counted_by="length"),
        )

    def unpack(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """ids, weights [T, K], entropy [T]; weight 0 behind a token's last id."""
        return {
            "ids": arrays["ids"].astype(np.int32),
            "weights": arrays["counts"].astype(np.float32) / np.float32(self.draws),
            "entropy": arrays["entropy"],
        }

    def probabilities(self, arrays: Mapping[str, Any]) -> Any:
        """The weights themselves."""
        return arrays["weights"]

    def targets(self, arrays: Mapping[str, Any], temperature: float) -> losses.SampledTargets:
        """`losses.SampledTargets` of unpacked arrays."""
        return losses.SampledTargets(
            ids=arrays["ids"], weights=arrays["weights"], temperature=temperature
        )


SCHEMES: dict[str, Any] = {scheme.name: scheme for scheme in (TopK, RandomSampling)}
"""Every scheme by the name under which manifests know it."""


def scheme_to_json(scheme: Scheme) -> dict[str, Any]:
    """The scheme as a JSON object: its name and its fields."""
    return {"name": scheme.name, **{key: getattr(scheme, key) for key in _fields(scheme)}}


def scheme_from_json(value: Mapping[str, Any]) -> Scheme:
    """The scheme that `scheme_to_json` wrote.

    Raises:
      InputError: an unknown scheme or field.
    """
    fields = {key: item for key, item in value.items() if key != "name"}
    known = SCHEMES.get(value.get("name", ""))
    if known is None:
        raise InputError(f"scheme: {value.get('name')!r} is none of {', '.join(SCHEMES)}")
    if fields.keys() != set(_fields(known)):
        raise InputError(f"scheme {known.name}: fields {sorted(fields)} are not {_fields(known)}")
    return known(**fields)


def to_targets(
    scheme: Scheme, arrays: Mapping[str, Any], *, temperature: float = 1.0
) -> losses.TopKTargets | losses.SampledTargets:
    """What the losses take, from a batch's stored arrays; jit-able.

    Args:
      scheme: the store's scheme, `store.scheme`.
      arrays: one teacher's arrays, `batch["targets"][name]`, with any leading axes.
      temperature: the store's temperature, `store.identity.temperature`.
    """
    return scheme.targets(arrays, temperature)


def _fields(scheme: Any) -> list[str]:
    return sorted(field.name for field in dataclasses.fields(scheme))
