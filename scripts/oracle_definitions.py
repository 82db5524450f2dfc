"""The losses' definitions in float64 NumPy, with their gradients derived by hand."""

import dataclasses
import math
from typing import Any

import numpy as np
import scipy.special

from distill_jax import losses
from distill_jax.losses import divergences

FLOOR = 0.1
"""The least size, in units, by which an error is divided."""
GOAL = 1e-5
TIE = 1e-5
"""Numbers this close, relatively, may fall on either side of each other in float32."""
BLUR = 2.0**-22
"""What is left of 24 bits after a few roundings."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows that share a loss, its parameters and their shape, and so one compiled program."""

    name: str
    kind: str  # dense, top-k, sampled, labels or pairs
    half: bool  # bfloat16 inputs
    size: int  # V
    ids: int  # K
    parameters: dict[str, float]

    @property
    def temperature(self) -> float:
        return self.parameters.get("temperature", 1.0)

    @property
    def units(self) -> tuple[float, float]:
        """The sizes of a value and of a gradient that are neither large nor small."""
        beta = self.parameters.get("beta", 1.0)
        if self.name == "ipo":
            return (0.5 / beta) ** 2, 1 / beta
        if self.kind == "pairs":
            return 1.0, beta
        return self.temperature**2, self.temperature


@dataclasses.dataclass
class Exact:
    """What a definition gives for every row, and what float32 cannot tell of it.

    `slack` is how far a gradient may be off, `unknown` marks rows that only have to be finite, and
    the sizes are multiples of the units.
    """

    value: np.ndarray
    gradient: np.ndarray
    slack: np.ndarray | float = 0.0
    unknown: np.ndarray | bool = False
    value_size: np.ndarray | float = 1.0
    gradient_size: np.ndarray | float = 1.0


@dataclasses.dataclass
class Outcomes:
    """A divergence of two distributions, at T = 1: its value and q df/dq of every outcome."""

    value: np.ndarray
    part: np.ndarray
    kink: np.ndarray | float = 0.0  # half of what q df/dq jumps by
    unknown: np.ndarray | bool = False
    value_size: np.ndarray | float = 1.0
    gradient_size: np.ndarray | float = 1.0


def exact(group: Group, student: np.ndarray, teacher: Any) -> Exact:
    """Values and gradients of a group's rows."""
    if group.kind == "pairs":
        return _exact_pairs(group, student, teacher.astype(np.float64))
    if group.kind == "labels":
        return _exact_labels(group, student, teacher)
    scaled = student / group.temperature
    if group.kind == "sampled":
        return _exact_sampled(group, scaled, teacher)
    log_p, log_q, spread, blurred = _outcomes(group, scaled, teacher)
    found = _divergence(group, log_p, log_q)
    q = np.exp(log_q)
    # The gradient by a logit of an outcome, of a function whose q df/dq is `part`.
    slope = found.part - q * found.part.sum(-1, keepdims=True)
    kink = np.broadcast_to(found.kink, q.shape)
    slack = spread(kink + q * kink.sum(-1, keepdims=True)) + blurred * np.abs(spread(slope))
    size = group.temperature
    return Exact(
        size**2 * found.value,
        size * spread(slope),
        size * slack,
        found.unknown,
        found.value_size,
        found.gradient_size,
    )


def _outcomes(group: Group, scaled: np.ndarray, teacher: Any):
    """log p, log q, what takes a gradient by outcomes to one by logits, and its uncertainty."""
    log_q = scipy.special.log_softmax(scaled, axis=-1)
    if group.kind == "dense":
        logits = teacher.astype(np.float64) / group.temperature
        return scipy.special.log_softmax(logits, axis=-1), log_q, lambda slope: slope, 0.0
    log_probs, tail = (np.asarray(one, np.float64) for one in (teacher.log_probs, teacher.log_tail))
    listed = np.isfinite(log_probs)
    row = np.arange(len(scaled))[:, None]
    ids = np.where(listed, teacher.ids, 0)
    outside = np.ones(scaled.shape, bool)
    outside[np.nonzero(listed)[0], ids[listed]] = False
    rest = scipy.special.logsumexp(np.where(outside, log_q, -np.inf), axis=-1)
    within = np.exp(np.where(outside & np.isfinite(log_q), log_q - rest[:, None], -np.inf))
    picked = np.where(listed, log_q[row, ids], -np.inf)

    def spread(slope):
        by_logits = slope[:, -1:] * within
        np.add.at(by_logits, (row, ids), np.where(listed, slope[:, :-1], 0.0))
        return by_logits

    log_p = np.concatenate([log_probs, tail[:, None]], -1)
    blurred = np.where(outside & np.isfinite(rest[:, None]), BLUR * np.abs(rest[:, None]), 0.0)
    return log_p, np.concatenate([picked, rest[:, None]], -1), spread, blurred


def _divergence(group: Group, log_p: np.ndarray, log_q: np.ndarray) -> Outcomes:
    name, a, b = group.name, group.parameters.get("alpha", 0), group.parameters.get("beta", 0)
    if name == "gkd":
        name = "forward_kl" if b == 0 else "reverse_kl"
    p, q = np.exp(log_p), np.exp(log_q)
    match name:
        case "forward_kl":
            return _forward(log_p, log_q)
        case "reverse_kl":
            return _reverse(log_p, log_q)
        case "adaptive_kl":
            return _adaptive(group, log_p, log_q)
        case "jensen_shannon":
            log_m = _mixture(log_p, log_q, b)
            student = (1 - b) * _times(q, log_q - log_m)
            return Outcomes((b * _times(p, log_p - log_m) + student).sum(-1), student)
        case "skewed_forward_kl":
            log_m = _mixture(log_p, log_q, a)
            part = -(1 - a) * _times(q, np.exp(log_p - log_m))
            return Outcomes(_times(p, log_p - log_m).sum(-1), part)
        case "skewed_reverse_kl":
            log_m = _mixture(log_q, log_p, a)
            value = _times(q, log_q - log_m)
            return Outcomes(value.sum(-1), value - a * _times(q, np.exp(log_q - log_m)))
        case "alpha_beta_divergence":
            cross, own = np.exp(a * log_p + b * log_q), np.exp((a + b) * log_q)
            terms = (a * np.exp((a + b) * log_p) + b * own) / (a * b * (a + b))
            size = np.maximum(1.0, terms.sum(-1))
            value = (terms - cross / (a * b)).sum(-1)
            return Outcomes(value, (own - cross) / a, value_size=size)
    tie = np.abs(p - q) <= TIE * np.maximum(p, q)
    part = 0.5 * q * np.where(tie, 0.0, np.sign(q - p))
    return Outcomes(0.5 * np.abs(p - q).sum(-1), part, np.where(tie, 0.5 * q, 0.0))


def _forward(log_p: np.ndarray, log_q: np.ndarray) -> Outcomes:
    p, ruled_out = np.exp(log_p), np.isneginf(log_q)
    value = _times(p, log_p - np.where(ruled_out, divergences.LOG_FLOOR, log_q)).sum(-1)
    return Outcomes(value, -np.where(ruled_out, 0.0, p))


def _reverse(log_p: np.ndarray, log_q: np.ndarray) -> Outcomes:
    part = _times(np.exp(log_q), log_q - np.maximum(log_p, divergences.LOG_FLOOR))
    value = part.sum(-1)
    return Outcomes(value, part, gradient_size=np.maximum(1.0, value))


def _adaptive(group: Group, log_p: np.ndarray, log_q: np.ndarray) -> Outcomes:
    mass, p = group.parameters["head_mass"], np.exp(log_p)
    ids = p[:, :-1] if group.kind == "top-k" else p
    ranked = np.sort(ids, -1)[:, ::-1]
    held = np.concatenate([np.zeros((len(p), 1)), np.cumsum(ranked, -1)], -1)

    def head(likelier_by: float, spare: float) -> np.ndarray:
        """Outcomes such that the likelier ones hold less than the mass and what is spare."""
        likelier = [
            row[np.searchsorted(-order, -one * (1 + likelier_by), "left")]
            for row, order, one in zip(held, ranked, ids)
        ]
        inside = np.asarray(likelier) < mass + spare
        return np.pad(inside, ((0, 0), (0, p.shape[-1] - ids.shape[-1])))

    gap = np.abs(p - np.exp(log_q))
    total = gap.sum(-1)
    weight = np.where(
        total > 0, (gap * head(0.0, 0.0)).sum(-1) / np.where(total > 0, total, 1), 0.5
    )
    forward, reverse = _forward(log_p, log_q), _reverse(log_p, log_q)
    value = weight * forward.value + (1 - weight) * reverse.value
    part = weight[:, None] * forward.part + (1 - weight[:, None]) * reverse.part
    # Gaps are differences of probabilities, which are known to BLUR.
    off = BLUR / total * np.abs(forward.value - reverse.value)
    unknown = off > GOAL / 2 * np.maximum(value, FLOOR)
    unknown |= (head(TIE, TIE) != head(0.0, -TIE)).any(-1)
    return Outcomes(value, part, unknown=unknown, gradient_size=reverse.gradient_size)


def _exact_sampled(group: Group, scaled: np.ndarray, teacher: losses.SampledTargets) -> Exact:
    weights = np.asarray(teacher.weights, np.float64)
    log_q = scipy.special.log_softmax(scaled, axis=-1)
    row, ids = np.arange(len(scaled))[:, None], np.where(weights > 0, teacher.ids, 0)
    picked = log_q[row, ids]
    ruled_out = np.isneginf(picked)
    log_ratio = np.log(weights) - np.where(ruled_out, divergences.LOG_FLOOR, picked)
    part = np.zeros_like(scaled)
    np.add.at(part, (row, ids), -np.where(ruled_out, 0.0, weights))
    slope = part - np.exp(log_q) * part.sum(-1, keepdims=True)
    size = group.temperature
    return Exact(size**2 * _times(weights, log_ratio).sum(-1), size * slope)


def _exact_labels(group: Group, logits: np.ndarray, labels: np.ndarray) -> Exact:
    z, s = group.parameters["z_loss"], group.parameters["label_smoothing"]
    log_z = scipy.special.logsumexp(logits, axis=-1)
    hot = np.arange(logits.shape[-1]) == labels[:, None]
    target = (1 - s) * hot + s / logits.shape[-1]
    value = _times(target, log_z[:, None] - logits).sum(-1) + z * log_z**2
    q = np.exp(logits - log_z[:, None])
    return Exact(value, q - target + 2 * z * log_z[:, None] * q)


def _exact_pairs(group: Group, policy_: np.ndarray, reference: np.ndarray) -> Exact:
    beta, e = group.parameters["beta"], group.parameters.get("label_smoothing", 0.0)
    ratio = policy_ - reference
    margin = ratio[:, 0] - ratio[:, 1]
    if group.name == "ipo":
        value, slope = (margin - 0.5 / beta) ** 2, 2 * (margin - 0.5 / beta)
    else:
        right, wrong = (np.logaddexp(0, sign * beta * margin) for sign in (-1, 1))
        sure, unsure = (scipy.special.expit(sign * beta * margin) for sign in (-1, 1))
        scale = 1 / (1 - 2 * e) if group.name == "robust_dpo" else 1.0
        e = -e if group.name == "robust_dpo" else e
        keep = 1 - abs(e)
        value = scale * (keep * right + e * wrong)
        slope = scale * beta * (e * unsure - keep * sure)
    return Exact(value, np.stack([slope, -slope], -1))


def _mixture(log_a: np.ndarray, log_b: np.ndarray, share: float) -> np.ndarray:
    return np.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def _times(weight: np.ndarray, values: np.ndarray) -> np.ndarray:
    """weight * values, where 0 times anything is 0."""
    return np.where(weight > 0, weight * values, 0.0)
