"""Several teachers: a mixture of them as one teacher, and what a token's weight may depend on.

A weighted sum of divergences, one from each teacher, is `weighted_sum`. For forward KL a mixture
gives nothing beyond that: it is linear in the teacher, so both have the same gradient. For every
other divergence they differ: against a mixture, reverse KL may settle on one teacher's answer,
where a sum of reverse KLs wants an answer that all of them allow.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.losses import divergences, sparse
from distill_jax.losses.objectives import (
    Objective,
    Schedule,
    TokenWeight,
    lookup,
    temperature_at,
)
from distill_jax.losses.targets import SampledTargets, Teacher, TopKTargets


def mixture(
    teachers: Sequence[Teacher],
    weights: Sequence[float | jax.Array],
    *,
    temperature: float | jax.Array = 1.0,
) -> Teacher:
    """The teacher whose distribution at `temperature` is sum_i w_i p_i.

    Logits z_i give logits T log sum_i w_i softmax(z_i / T): at the temperature T, but not at
    another one, they are the mixture of the teachers at T. `SampledTargets` give all of their ids
    with weights scaled by w_i, unbiased again as long as w_i does not depend on the same draws.

    Args:
      teachers: all logits [..., V], or all `SampledTargets` with the same leading axes.
      weights: one for each teacher, not negative and 1 in sum: numbers, or arrays [...] of a number
        per token, whose sum is not checked.
      temperature: of the divergence that will use the mixture.

    Returns:
      float32 logits [..., V] or `SampledTargets`, without gradient.

    Raises:
      TypeError: `TopKTargets`, which cannot be mixed exactly, or teachers of several kinds.
      ValueError: weights or shapes that do not fit, or samples stored at another temperature.
    """
    _check_weights(weights)
    if len(weights) != len(teachers):
        raise ValueError(f"{len(weights)} weights for {len(teachers)} teachers")
    if any(isinstance(teacher, TopKTargets) for teacher in teachers):
        raise TypeError(
            "TopKTargets cannot be mixed, because an id that one teacher lists is in another's "
            "bucket: use a weighted_sum of forward KLs, or SampledTargets, or logits"
        )
    samples = [teacher for teacher in teachers if isinstance(teacher, SampledTargets)]
    logits = [t for t in teachers if not isinstance(t, TopKTargets | SampledTargets)]
    if samples and logits:
        raise TypeError(
            "logits and SampledTargets cannot be mixed: use a weighted_sum of forward KLs"
        )
    shapes = [t.ids.shape[:-1] for t in samples] or [t.shape for t in logits]
    if len(set(shapes)) > 1:
        raise ValueError(f"teachers of shapes {', '.join(map(str, shapes))} cannot be mixed")
    leading = shapes[0] if samples else shapes[0][:-1]
    for weight in weights:
        if jnp.ndim(weight) and jnp.shape(weight) != leading:
            raise ValueError(f"weights {jnp.shape(weight)} do not fit teachers with {leading}")
    mix = _mix_samples if samples else _mix_logits
    return jax.lax.stop_gradient(mix(teachers, weights, temperature))


def _mix_logits(logits, weights, temperature) -> jax.Array:
    weighted = (
        jax.nn.log_softmax(jnp.asarray(z, jnp.float32) / temperature)
        + jnp.log(jnp.asarray(w, jnp.float32))[..., None]
        for z, w in zip(logits, weights, strict=True)
    )
    return temperature * functools.reduce(jnp.logaddexp, weighted)


def _mix_samples(samples, weights, temperature) -> SampledTargets:
    for teacher in samples:
        _check_stored(teacher, temperature, "a mixture")
    scaled = [
        jnp.asarray(w, jnp.float32)[..., None] * teacher.weights
        for teacher, w in zip(samples, weights, strict=True)
    ]
    ids = jnp.concatenate([teacher.ids for teacher in samples], axis=-1)
    return SampledTargets(ids, jnp.concatenate(scaled, axis=-1), temperature)


def distill_mixture(
    weights: Mapping[str, float | TokenWeight],
    divergence: Callable[..., jax.Array],
    *,
    temperature: float | Schedule = 1.0,
    **kwargs: Any,
) -> Objective:
    """A divergence from a mixture of teachers, T^2 D(sum_i w_i p_i, q); see `mixture`.

    With functions as weights a token can lean on the teacher that knows it best, as in
    `distill_mixture({n: label_confidence(n) for n in ("8b", "70b")}, reverse_kl)`. They are divided
    by their sum at each token, and are equal where it is 0.

    Args:
      weights: teachers by name, each with a number (1 in sum), or each with a function of the
        targets that gives a number per token [N], not negative.
      divergence: `forward_kl`, `reverse_kl` or any function of (student_logits, teacher).
      temperature: a number, or for logits a schedule of the step.
      **kwargs: passed to the divergence.

    Returns:
      An objective without terms.

    Raises:
      ValueError: numbers that are negative or not 1 in sum, or numbers beside functions.
    """
    numbers = [weight for weight in weights.values() if not callable(weight)]
    functions = [weight for weight in weights.values() if callable(weight)]
    if numbers and functions:
        raise ValueError("weights of a mixture must be all numbers or all functions of the targets")
    if not functions:
        _check_weights(numbers)

    def objective(logits_NV, targets, *, step=None):
        teachers = {name: lookup(targets, name) for name in weights}
        at = temperature_at(temperature, step, teachers)
        shares = _normalised([weight(targets) for weight in functions]) if functions else numbers
        mixed = mixture(list(teachers.values()), shares, temperature=at)
        return divergence(logits_NV, mixed, temperature=at, **kwargs), {}

    return objective


def _check_weights(weights: Sequence[Any]) -> None:
    if not weights:
        raise ValueError("a mixture needs at least one teacher")
    numbers = [weight for weight in weights if isinstance(weight, int | float | np.number)]
    if len(numbers) < len(weights):
        return
    if min(numbers) < 0 or not math.isclose(sum(numbers), 1.0, rel_tol=1e-6):
        listed = ", ".join(map(str, numbers))
        raise ValueError(f"weights of a mixture must be at least 0 and 1 in sum, got {listed}")


def _check_stored(
    teacher: TopKTargets | SampledTargets, temperature: float | jax.Array, purpose: str
) -> None:
    if isinstance(temperature, jax.Array) or teacher.temperature != temperature:
        raise ValueError(
            f"{type(teacher).__name__} stored at temperature {teacher.temperature} cannot give "
            f"{purpose} at temperature {temperature}: store them again or change it"
        )


def _normalised(weights: Sequence[jax.Array]) -> list[jax.Array]:
    total_N = functools.reduce(jnp.add, weights)
    some_N = total_N > 0
    divisor_N = jnp.where(some_N, total_N, 1.0)
    return [jnp.where(some_N, w_N / divisor_N, 1.0 / len(weights)) for w_N in weights]


def label_confidence(name: str, *, temperature: float = 1.0) -> TokenWeight:
    """The teacher's probability of the label, in [0, 1]; 0 for a label outside [0, V).

    Weighting a teacher by how close it comes to the label is the idea of CA-MKD (Zhang et al.
    2022), which turns the teachers' cross-entropies into weights.

    - Logits: softmax(z / T)[label].
    - `TopKTargets`: a lower bound, the probability of a listed label and 0 for any other.
    - `SampledTargets`: the weight of the label's draws, an unbiased estimate that may exceed 1 and
      often is 0. It is not independent of the draws, so it biases the gradient that they give.

    Args:
      name: the teacher's name; targets["labels"] is needed too.
      temperature: of the softmax.

    Returns:
      A function of the targets that gives float32 [N].

    Raises (when it is called):
      ValueError: no such targets, or stored at another temperature.
    """

    def confidence(targets):
        teacher, labels_N = lookup(targets, name), lookup(targets, "labels")
        if isinstance(teacher, TopKTargets | SampledTargets):
            _check_stored(teacher, temperature, "a confidence")
            p_NK = (
                jnp.exp(teacher.log_probs) if isinstance(teacher, TopKTargets) else teacher.weights
            )
            hit_NK = teacher.ids == labels_N[..., None]
            return jnp.sum(jnp.where(hit_NK, jnp.asarray(p_NK, jnp.float32), 0.0), axis=-1)
        picked, log_z_N = sparse.pick(sparse.soften(teacher, temperature), labels_N[..., None])
        known_N = (labels_N >= 0) & (labels_N < teacher.shape[-1])
        return jnp.where(known_N, jnp.exp(picked[..., 0] - log_z_N), 0.0)

    return confidence


def agreement(first: str, second: str, *, temperature: float = 1.0) -> TokenWeight:
    """1 - JSD(p_1, p_2) / log 2, which is 1 for equal teachers and 0 for disjoint ones.

    JSD is Jensen-Shannon's divergence (Lin 1991), at most log 2. `TopKTargets` are compared over
    the ids that both list and one bucket, a lower bound of the divergence and hence an upper bound
    of the agreement; if one teacher has logits, all ids that the other lists count.

    Args:
      first: a teacher's name.
      second: another one's.
      temperature: of both teachers.

    Returns:
      A function of the targets that gives float32 [N], in [0, 1].

    Raises (when it is called):
      TypeError: `SampledTargets`.
      ValueError: no such targets, or stored at another temperature.
    """

    def agree(targets):
        one, two = lookup(targets, first), lookup(targets, second)
        if isinstance(one, SampledTargets) or isinstance(two, SampledTargets):
            raise TypeError(
                f"the agreement of {first!r} and {second!r} cannot be estimated from "
                "SampledTargets: store TopKTargets or logits"
            )
        if isinstance(one, TopKTargets):
            one, two = two, one
        if isinstance(one, TopKTargets):
            for teacher in (one, two):
                _check_stored(teacher, temperature, "an agreement")
            jsd_N = divergences.jensen_shannon(*_common_outcomes(one, two))
        else:
            jsd_N = divergences.jensen_shannon(one, two, temperature=temperature)
            jsd_N = jsd_N / temperature**2
        return jnp.clip(1.0 - jsd_N / math.log(2.0), 0.0, 1.0)

    return agree


def disagreement(first: str, second: str, *, temperature: float = 1.0) -> TokenWeight:
    """JSD(p_1, p_2) / log 2, that is 1 - `agreement`, with its arguments, result and errors."""
    agree = agreement(first, second, temperature=temperature)
    return lambda targets: 1.0 - agree(targets)


def _common_outcomes(first: TopKTargets, second: TopKTargets) -> tuple[jax.Array, jax.Array]:
    """Both log-distributions over the ids that both list; what one alone lists is in its bucket."""
    p, q = jnp.exp(first.log_probs), jnp.exp(second.log_probs)
    # Padding slots, which have no probability, may hold an id that the other teacher lists.
    listed = (p > 0)[..., :, None] & (q > 0)[..., None, :]
    same = listed & (first.ids[..., :, None] == second.ids[..., None, :])
    p_shared, q_shared = jnp.any(same, axis=-1), jnp.any(same, axis=-2)
    p_rest = jnp.exp(first.log_tail) + jnp.sum(jnp.where(p_shared, 0.0, p), axis=-1)
    q_rest = jnp.exp(second.log_tail) + jnp.sum(jnp.where(q_shared, 0.0, q), axis=-1)
    p_there = jnp.where(p_shared, p, 0.0)
    q_there = jnp.sum(jnp.where(same, q[..., None, :], 0.0), axis=-1)
    p_all = jnp.concatenate([p_there, p_rest[..., None]], axis=-1)
    q_all = jnp.concatenate([q_there, q_rest[..., None]], axis=-1)
    return jnp.log(p_all), jnp.log(q_all)
