"""Importance scores of a model's prunable parts, and their file."""

import dataclasses
import json
import os

import numpy as np
import safetensors
import safetensors.numpy

from distill_jax.artifacts import InputError, resolve, write_bytes

_ARRAYS = (
    "layers",
    "heads",
    "kv_heads",
    "mlp",
    "embed",
    "attention_power",
    "mlp_power",
    "final_power",
)
_METADATA = ("method", "model", "rows", "removal_rows", "tokenizer")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """How much each prunable part of one model matters; larger matters more.

    Attributes:
      layers: float32 [L], block influence 1 - mean cos(in, out).
      heads: float32 [L, H].
      kv_heads: float32 [L, K], key/value heads together with the query heads that they serve.
      mlp: float32 [L, F], feed-forward neurons.
      embed: float32 [D], channels of the residual stream, summed over layers.
      attention_power: float32 [L, D], mean square of each channel at the attention norm, divided
        by the whole token's mean square; sums to D.
      mlp_power: float32 [L, D], the same at the feed-forward norm.
      final_power: float32 [D], the same at the final norm.
      method: how they were computed, with the aggregations.
      model: fingerprint of the model that was scored.
      rows: fingerprint of the calibration rows; empty when none were used.
      removal: float32 [L], mean cross-entropy in nats when a layer is left out, of
        `removal_losses`; None where it was not measured.
      removal_rows: fingerprint of the rows that it was measured on.
      tokenizer: fingerprint of the tokenizer that made the rows; empty where it is not known.
    """

    layers: np.ndarray
    heads: np.ndarray
    kv_heads: np.ndarray
    mlp: np.ndarray
    embed: np.ndarray
    attention_power: np.ndarray
    mlp_power: np.ndarray
    final_power: np.ndarray
    method: str
    model: str
    rows: str
    removal: np.ndarray | None = None
    removal_rows: str = ""
    tokenizer: str = ""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file whose metadata holds method and fingerprints."""
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        if self.removal is not None:
            arrays["removal"] = self.removal
        metadata = {name: getattr(self, name) for name in _METADATA}
        # One metadata entry: the writer does not keep the order of several, and the bytes count.
        header = {"scores": json.dumps(metadata, sort_keys=True)}
        write_bytes(path, safetensors.numpy.save(arrays, metadata=header))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Scores":
        """Reads what `save` wrote.

        Raises:
          InputError: the file is missing, damaged, or holds something else.
        """
        place = os.fspath(resolve(path))
        try:
            with safetensors.safe_open(place, framework="numpy") as file:
                metadata = json.loads((file.metadata() or {})["scores"])
                names = {*_ARRAYS, *file.keys()}
                arrays = {name: file.get_tensor(name) for name in names}
            return cls(**arrays, **metadata)
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{place}: not a scores file ({error})") from error
