"""A plan: which indices of each logical axis of a model survive.

Dimensions as in `distill_jax.models`; a prime marks what is kept: L', D', F', H', K', C'.
"""

import dataclasses
import os
from typing import Any, Literal, get_args

import numpy as np

from distill_jax import models
from distill_jax.artifacts import InputError, diff, read_json, write_json
from distill_jax.pruning.scores import Scores

LayerChoice = Literal["influence", "contiguous"]
"""Which layers go; see `make_plan`."""

_AXES = ("layers", "embed", "head_dim", "mlp", "kv_heads", "heads")
_SIZES = ("layers", "embed", "mlp", "heads", "kv_heads", "head_dim")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Which indices survive; a small JSON file on disk.

    Attributes:
      source: shape of the model to prune.
      target: shape of the pruned model.
      layers: int32 [L'], ascending.
      embed: int32 [D'], ascending, the same channels everywhere.
      head_dim: int32 [C'], whole rotary pairs in half-split order, the same in every head.
      mlp: int32 [L', F'], per kept layer, ascending.
      kv_heads: int32 [L', K'], per kept layer, ascending.
      heads: int32 [L', H'], per kept layer, ascending; each run of H'/K' heads belongs to the
        kept key/value head of the same rank.
      norm_scales: factor of each kept RMSNorm's weight: "attention" [L'], "mlp" [L'], "final" [1].
        See `make_plan`.
      method: how the scores were computed, and the layer choice.
      model: fingerprint of the scored model.
      rows: fingerprint of the calibration rows.
    """

    source: models.LlamaConfig
    target: models.LlamaConfig
    layers: np.ndarray
    embed: np.ndarray
    head_dim: np.ndarray
    mlp: np.ndarray
    kv_heads: np.ndarray
    heads: np.ndarray
    norm_scales: dict[str, np.ndarray]
    method: str
    model: str
    rows: str

    def to_json(self) -> dict[str, Any]:
        """A JSON object; indices are written as runs, such as "0-5 7 9-12", one text a layer."""
        indices = {}
        for name in _AXES:
            value = getattr(self, name)
            indices[name] = _runs(value) if value.ndim == 1 else [_runs(row) for row in value]
        return {
            "source": self.source.to_json(),
            "target": self.target.to_json(),
            "kept": indices,
            "norm_scales": {name: x.tolist() for name, x in self.norm_scales.items()},
            "method": self.method,
            "model": self.model,
            "rows": self.rows,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Reads what `save` wrote.

        Raises:
          InputError: the file is missing, is not a plan, or its indices do not fit its shapes.
        """
        value = read_json(path)
        try:
            kept: dict[str, Any] = {
                name: _from_runs(x) if isinstance(x, str) else np.stack([_from_runs(y) for y in x])
                for name, x in value["kept"].items()
            }
            plan = cls(
                source=models.LlamaConfig.from_json(value["source"]),
                target=models.LlamaConfig.from_json(value["target"]),
                **kept,
                norm_scales={
                    name: np.asarray(x, np.float32) for name, x in value["norm_scales"].items()
                },
                **{name: value[name] for name in ("method", "model", "rows")},
            )
            plan.check()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{os.fspath(path)}: not a pruning plan ({error})") from error
        return plan

    def check(self) -> None:
        """Checks that indices have the target's sizes, lie in the source, and respect KV groups.

        Raises:
          InputError: one line that names the axis.
        """
        for name in _AXES:
            value, L = getattr(self, name), self.target.layers
            size, limit = getattr(self.target, name), getattr(self.source, name)
            shape = (size,) if name in ("layers", "embed", "head_dim") else (L, size)
            if value.shape != shape:
                raise InputError(f"plan.{name} has shape {value.shape}; the target needs {shape}")
            if value.min() < 0 or value.max() >= limit:
                raise InputError(f"plan.{name} leaves the source's range 0 to {limit - 1}")
            if (np.diff(np.sort(value), axis=-1) == 0).any():
                raise InputError(f"plan.{name} keeps an index twice")
        group = self.heads // (self.source.heads // self.source.kv_heads)
        served = np.repeat(self.kv_heads, self.target.heads // self.target.kv_heads, axis=1)
        if (group != served).any():
            raise InputError("plan.heads separates query heads from their key/value head")

    def diff(self, other: "Plan") -> list[str]:
        """One line for every field, axis or layer in which the other plan differs."""
        mine, theirs = self.to_json(), other.to_json()
        for value in (mine, theirs):
            for name, kept in value["kept"].items():
                if isinstance(kept, list):
                    value["kept"][name] = {f"{i}": text for i, text in enumerate(kept)}
        return diff(mine, theirs)


def make_plan(
    scores: Scores,
    source: models.LlamaConfig,
    target: models.LlamaConfig,
    *,
    layer_choice: LayerChoice = "influence",
) -> Plan:
    """The plan that keeps the parts of highest score; of equal scores, the first.

    Query heads stay with their key/value head: K' key/value heads survive, and H'/K' of the query
    heads of each. Rotary pairs are kept where the target's own frequencies fall on the source's:
    halving head_dim keeps the even-numbered pairs, so that the result is a plain Llama. The
    frequencies compared are the unscaled ones; the target's rope_scaling may differ.

    norm_scales: an RMSNorm over D' channels divides by the root mean square of those alone. With
    u the normed input before the weight, the mean square of u over D' channels is the squared
    ratio of the two roots, so a weight times sqrt(mean over kept channels of E[u^2]) leaves each
    kept channel's mean square over the calibration tokens as it was. It is exact for every
    token whose kept channels hold the average share of its power.

    Args:
      scores: of a model of shape `source`.
      source: the model to prune.
      target: the shape wanted, no larger in any size, of the same vocabulary.
      layer_choice: "influence" drops the layers of least block influence (ShortGPT, Men et al.
        2024); "contiguous" drops the run of adjacent layers of least summed influence.

    Raises:
      InputError: the shapes do not allow it, or the scores are of another shape or not finite.
    """
    check_shapes(source, target)
    _check_scores(scores, source)
    if layer_choice not in get_args(LayerChoice):
        raise InputError(
            f"layer_choice is {layer_choice!r}; choose one of {', '.join(get_args(LayerChoice))}"
        )
    layers = _kept_layers(scores.layers, target.layers, layer_choice)
    embed = _highest(scores.embed, target.embed)
    kv_heads = _highest(scores.kv_heads[layers], target.kv_heads)
    power = {
        "attention": scores.attention_power[layers],
        "mlp": scores.mlp_power[layers],
        "final": scores.final_power[None],
    }
    return Plan(
        source=source,
        target=target,
        layers=layers,
        embed=embed,
        head_dim=_kept_rotary(source, target),
        mlp=_highest(scores.mlp[layers], target.mlp),
        kv_heads=kv_heads,
        heads=_kept_heads(scores.heads[layers], kv_heads, source, target),
        norm_scales={name: np.sqrt(x[:, embed].mean(-1) / x.mean(-1)) for name, x in power.items()},
        method=f"{scores.method}, layers by {layer_choice}",
        model=scores.model,
        rows=scores.rows,
    )


def check_shapes(source: models.LlamaConfig, target: models.LlamaConfig) -> None:
    """Checks that a model of shape `source` can be pruned to `target`.

    Raises:
      InputError: one line that names the field.
    """
    for name in _SIZES:
        old, new = getattr(source, name), getattr(target, name)
        if new > old:
            raise InputError(f"target.{name} is {new}, larger than the source's {old}")
    for name in ("vocab_size", "norm_eps"):
        old, new = getattr(source, name), getattr(target, name)
        if new != old:
            raise InputError(f"target.{name} is {new}; pruning keeps the source's {old}")
    if source.tied and not target.tied:
        raise InputError("target.tied is False, but the source has one tied matrix only")
    old, new = source.heads // source.kv_heads, target.heads // target.kv_heads
    if new > old:
        raise InputError(
            f"target has {new} query heads for each key/value head; the source has only {old}"
        )
    _kept_rotary(source, target)


def _check_scores(scores: Scores, source: models.LlamaConfig) -> None:
    L, D = source.layers, source.embed
    shapes = {
        "layers": (L,),
        "heads": (L, source.heads),
        "kv_heads": (L, source.kv_heads),
        "mlp": (L, source.mlp),
        "embed": (D,),
        "attention_power": (L, D),
        "mlp_power": (L, D),
        "final_power": (D,),
    }
    for name, shape in shapes.items():
        value = getattr(scores, name)
        if value.shape != shape:
            raise InputError(
                f"scores.{name} has shape {value.shape}, but the source model needs {shape}"
            )
        if not np.isfinite(value).all():
            raise InputError(f"scores.{name} holds NaN or infinity")


def _highest(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` highest scores of the last axis, ascending."""
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :count]
    return np.sort(order, axis=-1).astype(np.int32)


def _kept_layers(influence: np.ndarray, count: int, choice: LayerChoice) -> np.ndarray:
    if choice == "influence":
        return _highest(influence, count)
    dropped = len(influence) - count
    if dropped == 0:
        return np.arange(count, dtype=np.int32)
    windows = np.lib.stride_tricks.sliding_window_view(influence, dropped).sum(-1)
    start = int(np.argmin(windows))
    return np.delete(np.arange(len(influence), dtype=np.int32), np.s_[start : start + dropped])


def _kept_heads(
    scores: np.ndarray,
    kv_heads: np.ndarray,
    source: models.LlamaConfig,
    target: models.LlamaConfig,
) -> np.ndarray:
    """The best H'/K' query heads of each kept key/value head, [L', H']."""
    old, new = source.heads // source.kv_heads, target.heads // target.kv_heads
    grouped = scores.reshape(len(scores), source.kv_heads, old)
    grouped = np.take_along_axis(grouped, kv_heads[..., None], axis=1)
    heads = kv_heads[..., None] * old + _highest(grouped, new)
    return heads.reshape(len(scores), target.heads).astype(np.int32)


def _kept_rotary(source: models.LlamaConfig, target: models.LlamaConfig) -> np.ndarray:
    """Channels of the source's rotary pairs whose frequencies are the target's, half-split."""

    def exponents(config: models.LlamaConfig) -> np.ndarray:
        pairs = np.arange(0, config.head_dim, 2)
        return np.log(config.rope_theta) * pairs / config.head_dim

    distance = np.abs(exponents(target)[:, None] - exponents(source))
    pairs = distance.argmin(axis=1)
    if distance.min(axis=1).max() > 1e-6:
        raise InputError(
            f"target.head_dim {target.head_dim} with rope_theta {target.rope_theta:g} has rotary "
            f"frequencies that the source's {source.head_dim} with {source.rope_theta:g} lacks; "
            "divide head_dim by a whole number and keep rope_theta"
        )
    return np.concatenate((pairs, pairs + source.head_dim // 2)).astype(np.int32)


def _runs(indices: np.ndarray) -> str:
    """Indices as text, in their order: "0-5 7 9-12"."""
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    return " ".join(
        f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in np.split(indices, breaks)
    )


def _from_runs(text: str) -> np.ndarray:
    """The indices that `_runs` wrote."""
    runs = [[int(x) for x in run.split("-")] for run in text.split()]
    return np.concatenate([np.arange(run[0], run[-1] + 1) for run in runs]).astype(np.int32)
