"""What must hold of a divergence besides, and of an objective under exact and sampled targets."""

import itertools
from typing import Any

import numpy as np

from distill_jax import losses
from distill_jax.testing import cases
from distill_jax.testing.cases import SHAPES, Case
from distill_jax.testing.properties import Properties, expect_all_close, expect_close
from distill_jax.testing.subject import Subject

PROPERTIES = Properties()


def _not_a_divergence(subject: Subject) -> str | None:
    return None if subject.is_divergence else "for divergences only"


def _not_exact(subject: Subject) -> str | None:
    if subject.has("sampled"):
        return "samples give the gradient on average, not the value"
    return _not_a_divergence(subject)


def _teacher(case: Case) -> tuple[str, np.ndarray, float]:
    """Name, logits and temperature of a divergence's only teacher."""
    ((name, temperature),) = case.temperatures.items()
    return name, case.teachers[name], temperature


@PROPERTIES.add("zero", "the value is zero at student = teacher", why_not=_not_exact)
def _zero(subject: Subject, case: Case) -> None:
    loss = subject.run(case, logits=_teacher(case)[1]).loss
    expect_close(loss, np.zeros_like(loss), "loss at student = teacher", subject.tolerance)


@PROPERTIES.add(
    "zero gradient",
    "the gradient is zero at student = teacher (not so where a divergence has a kink there)",
    why_not=_not_exact,
)
def _zero_gradient(subject: Subject, case: Case) -> None:
    slope = subject.run(case, logits=_teacher(case)[1]).gradient
    expect_close(slope, np.zeros_like(slope), "gradient at student = teacher", subject.tolerance)


@PROPERTIES.add("never negative", "the value is at least zero", why_not=_not_exact)
def _never_negative(subject: Subject, case: Case) -> None:
    loss = subject.run(case).loss
    expect_close(np.minimum(loss, 0.0), np.zeros_like(loss), "loss", subject.tolerance)


@PROPERTIES.add(
    "temperature",
    "at temperature T, value = T^2 * value of (student / T, teacher / T) at temperature 1",
    why_not=_not_a_divergence,
)
def _temperature(subject: Subject, case: Case) -> None:
    name, teacher, temperature = _teacher(case)
    cold = Case(
        case.logits / np.float32(temperature),
        {name: teacher / np.float32(temperature)},
        case.labels,
        case.where,
        {name: 1.0},
        case.seed,
    )
    out, expected = subject.run(case), subject.run(cold)
    note = f" at temperature {temperature}:"
    if subject.has("sampled"):  # from a softmax that was rounded otherwise others may be drawn
        targets = subject.targets(case)
        warm = targets[name]
        targets = {**targets, name: losses.SampledTargets(warm.ids, warm.weights)}
        expected = subject.run(cold, targets)
    expect_close(out.loss, temperature**2 * expected.loss, f"loss{note}", subject.tolerance)
    gradient = temperature * expected.gradient
    expect_close(out.gradient, gradient, f"gradient{note}", subject.tolerance)


@PROPERTIES.add(
    "top-k bucket",
    "TopKTargets stand for K + 1 outcomes, the ids and one bucket for all others, and are not "
    "renormalised: the value is that of logits over these outcomes",
    shapes=SHAPES[1:2],
    why_not=lambda subject: _no_bucket(subject),
)
def _top_k_bucket(subject: Subject, case: Case) -> None:
    name, teacher, temperature = _teacher(case)
    targets = subject.targets(case)
    ids = targets[name].ids
    student, coarse = (
        (temperature * np.log(cases.coarsened(cases.softmax(side, temperature), ids))).astype(
            np.float32
        )
        for side in (case.logits, teacher)
    )
    expected = subject.run(case, {**targets, name: coarse}, logits=student).loss
    expect_close(subject.run(case, targets).loss, expected, "loss", subject.tolerance)


def _no_bucket(subject: Subject) -> str | None:
    if not subject.has("top_k"):
        return "for top-k targets only"
    if "dense" not in subject.accepted:
        return "there are no dense targets to compare with"
    return _not_a_divergence(subject)


@PROPERTIES.add(
    "K = V",
    "TopKTargets that list the whole vocabulary give what logits give",
    shapes=SHAPES[1:2],
    why_not=lambda subject: _nothing_to_compare(subject, "top_k"),
)
def _whole_vocabulary(subject: Subject, case: Case) -> None:
    dense = dict.fromkeys(subject.kinds, "dense")
    whole = cases.targets_of(case, subject.kinds, k=case.logits.shape[1])
    expected = subject.run(case, cases.targets_of(case, dense)).per_token()
    out = subject.run(case, whole).per_token()
    expect_all_close(out, expected, " with K = V:", subject.tolerance)


@PROPERTIES.add(
    "unbiased samples",
    "the gradient with SampledTargets, averaged over all samples there are, is that with logits",
    shapes=((1, 4),),
    examples=10,
    one_temperature=True,
    why_not=lambda subject: _nothing_to_compare(subject, "sampled"),
)
def _unbiased_samples(subject: Subject, case: Case) -> None:
    (name,) = subject.kinds
    vocabulary, temperature = case.logits.shape[1], case.temperatures[name]
    draws: Any = np.asarray(list(itertools.product(range(vocabulary), repeat=2)), np.int32)
    p = cases.softmax(case.teachers[name][0], temperature)
    chances = p[draws].prod(-1)
    # All samples side by side, as tokens that differ in nothing else.
    weights: Any = np.full(draws.shape, 0.5, np.float32)
    targets = {
        "labels": np.repeat(case.labels, len(draws)),
        name: losses.SampledTargets(draws, weights, temperature),
    }
    logits = np.repeat(case.logits, len(draws), axis=0)
    mean = chances @ subject.run(case, targets, logits=logits).gradient
    exact = subject.run(case, cases.targets_of(case, {name: "dense"})).gradient[0]
    expect_close(mean, exact, "mean gradient", subject.tolerance)


def _nothing_to_compare(subject: Subject, kind: str) -> str | None:
    if {*subject.kinds.values()} != {kind}:
        return f"for {kind} targets only"
    if "dense" not in subject.accepted:
        return "there are no dense targets to compare with"
    if kind == "sampled" and len(subject.kinds) > 1:
        return "for one teacher only"
    return None
