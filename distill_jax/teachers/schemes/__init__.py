"""What of a teacher's distribution is kept: one frozen config for each way to sample it.

A scheme has two halves. `encode` runs on the device inside the teacher's jitted forward
pass and reduces logits [N, V] to a few arrays [N] and [N, width]. `columns` says how those
are stored, and `unpack` turns what comes back from disk into what training takes.

Letters: N tokens, V vocabulary, K kept ids.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from distill_jax import losses
from distill_jax.artifacts import InputError
from distill_jax.teachers.schemes.interface import Scheme
from distill_jax.teachers.schemes.random_sampling import RandomSampling
from distill_jax.teachers.schemes.threshold import Threshold
from distill_jax.teachers.schemes.top_k import TopK

__all__ = [
    "SCHEMES",
    "RandomSampling",
    "Scheme",
    "Threshold",
    "TopK",
    "blank_row",
    "scheme_from_json",
    "scheme_to_json",
    "to_targets",
]

SCHEMES: dict[str, Any] = {scheme.name: scheme for scheme in (TopK, RandomSampling, Threshold)}
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


def blank_row(scheme: Scheme, tokens: int, vocab_size: int) -> dict[str, np.ndarray]:
    """What a store's row gives for training, of these shapes and types, with nothing kept.

    As wide as the scheme's widest token can be; a store is as wide as the widest that it has.
    """
    columns = {
        column.name: np.zeros(
            tokens if column.counted_by is None else (tokens, scheme.width),
            np.int32 if column.steps is None else np.float32,
        )
        for column in scheme.columns(vocab_size)
    }
    return scheme.unpack(columns)


def _fields(scheme: Any) -> list[str]:
    return sorted(field.name for field in dataclasses.fields(scheme))
