"""Sets schemes up for a number of ids a token, and measures the bytes that these take."""

import functools
import math
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from distributions import BATCH, Batch

from distill_jax import teachers
from distill_jax.teachers import order, sampling, vocabulary
from distill_jax.teachers.codec import Codec

NAMES = ("top_k", "random_sampling", "threshold")
"""Of the schemes that can be set up."""

Arrays = Mapping[str, np.ndarray]


def scheme_for(name: str, logits_NV: jax.Array, ids: float) -> teachers.Scheme:
    """The scheme of this name that keeps so many ids a token on average over some tokens."""
    if name == "top_k":
        return teachers.TopK(k=max(1, round(ids)))
    if name == "random_sampling":
        return teachers.RandomSampling(draws=draws_for(logits_NV, ids))
    return teachers.Threshold(tau=float(teachers.threshold_for(logits_NV, ids)))


def draws_for(logits_NV: jax.Array, ids: float) -> int:
    """The draws at which `RandomSampling` keeps so many ids a token on average over some tokens.

    That average is mean_N sum_v 1 - (1 - p_v)^draws, which rises with the draws.
    """
    low, high = 0.0, math.log(4096)
    for _ in range(16):
        middle = (low + high) / 2
        many = float(_distinct(logits_NV, math.exp(middle))) > ids
        low, high = (low, middle) if many else (middle, high)
    return round(math.exp((low + high) / 2))


@jax.jit
def _distinct(logits_NV: jax.Array, draws: float) -> jax.Array:
    probs_NV = jnp.exp(vocabulary.log_softmax(logits_NV))
    return -jnp.expm1(draws * jnp.log1p(-probs_NV)).sum(axis=-1).mean()


def encode(
    schemes: tuple[teachers.Scheme, ...],
    logits_NV: jax.Array,
    labels_N: np.ndarray,
    keys_N: jax.Array,
) -> list[dict[str, np.ndarray]]:
    """What every scheme keeps of some tokens."""
    return jax.tree.map(np.asarray, _encode(schemes, logits_NV, labels_N, keys_N))


@functools.partial(jax.jit, static_argnums=0)
def _encode(
    schemes: tuple[teachers.Scheme, ...],
    logits_NV: jax.Array,
    labels_N: jax.Array,
    keys_N: jax.Array,
) -> list[dict[str, jax.Array]]:
    return [scheme.encode(logits_NV, labels_N, keys_N, 1.0) for scheme in schemes]


def batch_keys(seed: int, index: int) -> jax.Array:
    """One random key for every token of a batch."""
    return sampling.token_keys(jnp.array([seed, index], jnp.uint32), jnp.arange(BATCH))


def record_bytes(scheme: teachers.Scheme, batches: list[Arrays], token_counts: np.ndarray) -> int:
    """Bytes of the record that a store makes of all of these tokens as one row."""
    arrays = {name: np.concatenate([some[name] for some in batches]) for name in batches[0]}
    codec = Codec(
        columns=scheme.columns(len(token_counts)),
        order=order.by_frequency(token_counts),
        tokens=len(arrays["length"]),
        teacher="quality",
    )
    return len(codec.encode(arrays, "row"))


class Calibration:
    """Schemes at a mean number of ids, or at a number of bytes, of some tokens."""

    def __init__(self, batches: Iterator[Batch], token_counts: np.ndarray):
        some = list(batches)
        self._labels_N = np.concatenate([batch.labels_N for batch in some])
        self._logits_NV = jnp.concatenate([batch.teacher_NV for batch in some])
        self._token_counts = token_counts

    @functools.cache  # noqa: B019 - it lives as long as the measurement
    def at_ids(self, name: str, ids: float) -> teachers.Scheme:
        return scheme_for(name, self._logits_NV, ids)

    def at_bytes(self, name: str, budget: float, known: tuple[float, float]) -> teachers.Scheme:
        """The scheme that takes so many bytes a token; they rise evenly with the ids.

        Args:
          name: of the scheme.
          budget: the bytes.
          known: two numbers of ids, whose bytes are measured.
        """
        low, high = (self._bytes(self.at_ids(name, ids)) for ids in known)
        share = (budget - low) / (high - low)
        return self.at_ids(name, known[0] + share * (known[1] - known[0]))

    def _bytes(self, scheme: teachers.Scheme) -> float:
        """Bytes a token of a record of all tokens."""
        encoded = []
        for start in range(0, len(self._labels_N), BATCH):
            some = slice(start, start + BATCH)
            logits_NV, labels_N = self._logits_NV[some], self._labels_N[some]
            encoded += encode((scheme,), logits_NV, labels_N, batch_keys(0, start))
        return record_bytes(scheme, encoded, self._token_counts) / len(self._labels_N)
