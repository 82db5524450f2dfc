"""Objectives: plain functions that say what a token's logits should be, and that compose.

An objective is `objective(logits_NV, targets, *, step=None) -> (loss_N, {name: term_N})`, where
`targets` maps "labels" to int labels [N] and a teacher's name to its logits or stored targets.
Anything of that form may stand wherever one of these does.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from distill_jax.losses import divergences, labels
from distill_jax.losses.targets import SampledTargets, Teacher, TopKTargets

Schedule = Callable[[Any], Any]
"""Maps the training step to a scalar."""

TokenWeight = Callable[[Mapping[str, Any]], jax.Array]
"""Maps an objective's targets to a number per token [N]."""


class Objective(Protocol):
    """What `weighted_sum` combines and `fused_linear` minimises."""

    def __call__(
        self, logits_NV: jax.Array, targets: Mapping[str, Any], *, step: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Per-token loss [N], and named per-token parts of it [N] for the log."""
        ...


def hard_labels(*, z_loss: float = 0.0, label_smoothing: float = 0.0) -> Objective:
    """Cross-entropy with targets["labels"]; see `cross_entropy` for formula and sources.

    Args:
      z_loss: weight of (log Z)^2.
      label_smoothing: share of the target that is spread evenly, in [0, 1).

    Returns:
      An objective. With a z-loss or smoothing, its term "cross_entropy" is the plain one.

    Raises (when it is called):
      ValueError: no labels, or what `cross_entropy` raises.
    """

    def objective(logits_NV, targets, *, step=None):
        del step
        labels_N = lookup(targets, "labels")
        plain = labels.cross_entropy(logits_NV, labels_N)
        if not (z_loss or label_smoothing):
            return plain, {}
        loss = labels.cross_entropy(
            logits_NV, labels_N, z_loss=z_loss, label_smoothing=label_smoothing
        )
        return loss, {"cross_entropy": plain}

    return objective


def distill(
    name: str,
    divergence: Callable[..., jax.Array],
    *,
    temperature: float | Schedule = 1.0,
    **kwargs: Any,
) -> Objective:
    """A divergence from the teacher targets[name].

    Args:
      name: the teacher's name.
      divergence: `forward_kl`, `reverse_kl` or any function of (student_logits, teacher).
      temperature: passed to the divergence; a number, or a schedule of the step, which must then
        be given. A schedule needs the teacher's logits: stored targets are of one temperature, and
        are refused with a ValueError whatever the schedule gives.
      **kwargs: passed too.

    Returns:
      An objective without terms.

    Raises (when it is called):
      ValueError: no such teacher, or a schedule without a step; and what the divergence raises.
    """

    def objective(logits_NV, targets, *, step=None):
        teacher = lookup(targets, name)
        at = temperature_at(temperature, step, {name: teacher})
        return divergence(logits_NV, teacher, temperature=at, **kwargs), {}

    return objective


def taid(
    name: str, fraction: float | Schedule, *, temperature: float | Schedule = 1.0
) -> Objective:
    """Forward KL to a teacher that moves from the student to targets[name] (Shing et al. 2025).

    Args:
      name: the teacher's name; its targets must be logits.
      fraction: t of `interpolate_logits`, a number or a schedule of the step.
      temperature: of the forward KL, a number or a schedule of the step.

    Returns:
      An objective without terms.

    Raises (when it is called):
      TypeError: stored targets.
      ValueError: no such teacher, or a schedule without a step.
    """

    def objective(logits_NV, targets, *, step=None):
        teacher = lookup(targets, name)
        if not hasattr(teacher, "shape"):
            raise TypeError(f"taid needs the logits of {name!r}, got {type(teacher).__name__}")
        t = _at_step(fraction, step, name)
        moving = divergences.interpolate_logits(logits_NV, teacher, t)
        at = temperature_at(temperature, step, {name: teacher})
        return divergences.forward_kl(logits_NV, moving, temperature=at), {}

    return objective


def weighted_sum(**named: tuple[float | Schedule, Objective]) -> Objective:
    """Sum of weight * objective.

    Args:
      **named: pairs (weight, objective). A weight is a number or a schedule of the step, which
        must then be given.

    Returns:
      An objective. Its terms are each one's own loss, unweighted, under its name, and the terms of
      that under "name/term".

    Raises:
      ValueError: nothing to sum; when it is called, a schedule without a step.
    """
    if not named:
        raise ValueError("weighted_sum needs at least one name=(weight, objective)")

    def objective(logits_NV, targets, *, step=None):
        total = jnp.zeros(logits_NV.shape[:-1], jnp.float32)
        terms = {}
        for name, (weight, part) in named.items():
            loss_N, parts = part(logits_NV, targets, step=step)
            if not (isinstance(weight, int | float) and weight == 0):  # 0 times infinity is NaN
                total = total + _at_step(weight, step, name) * loss_N
            terms[name] = loss_N
            terms.update({f"{name}/{inner}": term_N for inner, term_N in parts.items()})
        return total, terms

    return objective


def token_weighted(objective: Objective, weight: TokenWeight) -> Objective:
    """weight(targets)_N * objective, token by token; the weight has no gradient.

    The mean still divides by the number of tokens, not by the sum of these weights: weights below 1
    make the whole loss smaller.

    Args:
      objective: what to weight.
      weight: any function of the targets, such as `label_confidence` or `agreement` give. It must
        treat tokens independently.

    Returns:
      An objective. Its terms are "token_weight", the loss without the weight as "unweighted", and
      the terms of that under "unweighted/term".

    Raises (when it is called):
      ValueError: the weights are not one number per token.
    """

    def weighted(logits_NV, targets, *, step=None):
        loss_N, terms = objective(logits_NV, targets, step=step)
        weight_N = jax.lax.stop_gradient(jnp.asarray(weight(targets), jnp.float32))
        if weight_N.shape != loss_N.shape:
            raise ValueError(f"token weights {weight_N.shape} do not fit a loss {loss_N.shape}")
        plain = {f"unweighted/{name}": term_N for name, term_N in terms.items()}
        return weight_N * loss_N, {"token_weight": weight_N, "unweighted": loss_N, **plain}

    return weighted


def lookup(targets: Mapping[str, Any], name: str) -> Any:
    """targets[name], or a ValueError that says what there is."""
    if name not in targets:
        raise ValueError(f"no targets {name!r}; there are {', '.join(sorted(targets)) or 'none'}")
    return targets[name]


def temperature_at(
    temperature: float | Schedule, step: jax.Array | None, teachers: Mapping[str, Teacher]
) -> Any:
    """The temperature at a step; ValueError if stored targets were to follow a schedule."""
    for name, teacher in teachers.items():
        if callable(temperature) and isinstance(teacher, TopKTargets | SampledTargets):
            raise ValueError(
                f"{type(teacher).__name__} of {name!r}, stored at temperature "
                f"{teacher.temperature}, cannot serve a schedule of temperatures: use that "
                "number, or the teacher's logits"
            )
    return _at_step(temperature, step, " and ".join(teachers))


def _at_step(value: float | Schedule, step: jax.Array | None, name: str) -> Any:
    if not callable(value):
        return value
    if step is None:
        raise ValueError(f"{name!r} follows a schedule: pass step")
    return value(step)
