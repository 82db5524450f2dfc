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

LayerChoice = Literal["influence", "contiguous", "perplexity"]
"""Which layers go; see `make_plan`."""

KvChoice = Literal["drop", "merge"]
"""What becomes of key/value heads when there are to be fewer; see `make_plan`."""

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
        kept key/value head of the same rank, or to those merged into it.
      norm_scales: factor of each kept RMSNorm's weight: "attention" [L'], "mlp" [L'], "final" [1].
        See `make_plan`.
      method: how the scores were computed, and the layer choice.
      model: fingerprint of the scored model.
      rows: fingerprint of the calibration rows.
      merged_kv_heads: int32 [L', K', m], the source's key/value heads whose mean each kept one is
        to become (`merge_kv_heads` does it), itself first; None where none are merged.
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
    merged_kv_heads: np.ndarray | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON object; indices are written as runs, such as "0-5 7 9-12", one text a layer."""
        indices = {}
        for name in _AXES:
            value = getattr(self, name)
            indices[name] = _runs(value) if value.ndim == 1 else [_runs(row) for row in value]
        merged = {}
        if self.merged_kv_heads is not None:
            merged["merged_kv_heads"] = [[_runs(x) for x in y] for y in self.merged_kv_heads]
        return {
            "source": self.source.to_json(),
            "target": self.target.to_json(),
            "kept": indices,
            **merged,
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
                merged_kv_heads=np.stack(
                    [[_from_runs(x) for x in y] for y in value["merged_kv_heads"]]
                )
                if "merged_kv_heads" in value
                else None,
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
        merged = self.kv_heads[..., None] if self.merged_kv_heads is None else self.merged_kv_heads
        if merged.ndim != 3 or merged.shape[:2] != self.kv_heads.shape:
            raise InputError(
                f"plan.merged_kv_heads has shape {merged.shape}; it needs one list for each of the "
                f"{self.kv_heads.shape} kept key/value heads"
            )
        if (merged[..., 0] != self.kv_heads).any() or not _distinct(merged, self.source.kv_heads):
            raise InputError(
                "plan.merged_kv_heads must name each kept key/value head first, and none twice"
            )
        group = self.heads // (self.source.heads // self.source.kv_heads)
        served = np.repeat(merged, self.target.heads // self.target.kv_heads, axis=1)
        if not (group[..., None] == served).any(axis=-1).all():
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
    kv_choice: KvChoice = "drop",
) -> Plan:
    """The plan that keeps the parts of highest score; of equal scores, the first.

    Query heads stay with their key/value head: K' key/value heads survive, and H'/K' of the query
    heads of each. Or all K are merged, K/K' neighbours into one (Ainslie et al. 2023), which then
    serves the best H'/K' of all their query heads. Rotary pairs are kept where the target's own
    frequencies fall on the source's: halving head_dim keeps the even-numbered pairs, so that the
    result is a plain Llama. The frequencies compared are the unscaled ones; the target's
    rope_scaling may differ.

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
        2024), or whatever else the method says of layers; "contiguous" drops the run of adjacent
        layers of least summed influence; "perplexity" drops those without which the calibration
        rows are predicted best, each taken alone (of `removal_losses`).
      kv_choice: "drop" keeps the best key/value heads; "merge" averages them. `merge_kv_heads`
        does so to the parameters, before the plan is applied.

    Raises:
      InputError: the shapes do not allow it, or the scores are of another shape or not finite.
    """
    check_shapes(source, target, kv_choice=kv_choice)
    _check_scores(scores, source)
    if layer_choice not in get_args(LayerChoice):
        raise InputError(
            f"layer_choice is {layer_choice!r}; choose one of {', '.join(get_args(LayerChoice))}"
        )
    layers = _kept_layers(scores, target.layers, layer_choice)
    embed = _highest(scores.embed, target.embed)
    merged = None
    if kv_choice == "merge" and target.kv_heads < source.kv_heads:
        merged = np.arange(source.kv_heads, dtype=np.int32).reshape(1, target.kv_heads, -1)
        merged = np.repeat(merged, len(layers), axis=0)
        kv_heads = merged[..., 0]
    else:
        kv_heads = _highest(scores.kv_heads[layers], target.kv_heads)
    groups = kv_heads[..., None] if merged is None else merged
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
        heads=_kept_heads(scores.heads[layers], groups, source, target),
        norm_scales={name: np.sqrt(x[:, embed].mean(-1) / x.mean(-1)) for name, x in power.items()},
        method=f"{scores.method}, layers by {layer_choice}",
        model=scores.model,
        rows=scores.rows,
        merged_kv_heads=merged,
    )


def check_shapes(
    source: models.LlamaConfig, target: models.LlamaConfig, *, kv_choice: KvChoice = "drop"
) -> None:
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
    if kv_choice == "merge":
        if source.kv_heads % target.kv_heads:
            raise InputError(
                f"target.kv_heads is {target.kv_heads}; the source's {source.kv_heads} key/value "
                "heads do not merge into so many of equal size"
            )
        old = source.heads // target.kv_heads
    elif kv_choice != "drop":
        raise InputError(
            f"kv_choice is {kv_choice!r}; choose one of {', '.join(get_args(KvChoice))}"
        )
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
    if scores.removal is not None:
        shapes["removal"] = (L,)
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


def _distinct(indices: np.ndarray, limit: int) -> bool:
    """Whether each layer's indices differ and lie below the limit."""
    flat = np.sort(indices.reshape(len(indices), -1))
    return bool(flat[:, 0].min() >= 0 and flat.max() < limit and (np.diff(flat) > 0).all())


def _kept_layers(scores: Scores, count: int, choice: LayerChoice) -> np.ndarray:
    influence = scores.layers
    if choice == "perplexity":
        if scores.removal is None:
            raise InputError(
                "layer_choice is 'perplexity', but the scores lack the losses without each layer"
            )
        return _highest(scores.removal, count)
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
    groups: np.ndarray,
    source: models.LlamaConfig,
    target: models.LlamaConfig,
) -> np.ndarray:
    """The best H'/K' query heads of each group [L', K', m] of key/value heads, [L', H']."""
    each = source.heads // source.kv_heads
    heads = (groups[..., None] * each + np.arange(each)).reshape(*groups.shape[:2], -1)
    layers = np.arange(len(scores))[:, None, None]
    best = _highest(scores[layers, heads], target.heads // target.kv_heads)
    kept = np.take_along_axis(heads, best, axis=-1)
    return kept.reshape(len(scores), target.heads).astype(np.int32)


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
