"""`check_objective` and `check_divergence`: every property, on small cases that are searched."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from distill_jax import losses
from distill_jax.testing import cases, of_divergences, of_objectives, of_transformations
from distill_jax.testing.cases import KINDS, Case
from distill_jax.testing.probe import mixes_of_kinds
from distill_jax.testing.properties import Property
from distill_jax.testing.report import PropertyError, Report, Result
from distill_jax.testing.subject import Subject

PROPERTIES: dict[str, Property] = {
    **of_objectives.PROPERTIES,
    **of_transformations.PROPERTIES,
    **of_divergences.PROPERTIES,
}
"""All properties by name, in the order in which they are tried."""


def check_objective(
    objective: losses.Objective,
    *,
    teachers: Sequence[str] = (),
    kinds: Sequence[str] | None = None,
    temperature: float | Mapping[str, float] = 1.0,
    step: int = 1,
    reference: Callable[..., float] | None = None,
    skip: Collection[str] = (),
    examples: int = 40,
    tolerance: float = 1e-4,
) -> Report:
    """Tries every property in `PROPERTIES` that an objective must have.

        print(testing.check_objective(my_objective, teachers=("8b",)))

    The targets that the objective receives hold "labels" and, for each teacher, logits,
    `TopKTargets` or `SampledTargets`: every kind that it takes is tried. Cases are small (up to 4
    tokens and 9 entries), the same every time, and a failing one is made as small and plain as
    possible. A check takes some seconds, most of which go into compiling.

    A property that a loss lacks by its nature is named in `skip`: a z-loss is not invariant under
    "constant shift"; label smoothing is infinite at "-inf in student" and depends on the "padded
    vocabulary"; TAID and whatever else hides a part of the student behind `stop_gradient` has no
    "numerical gradient".

    Args:
      objective: `objective(logits_NV, targets, *, step=None) -> (loss_N, {name: term_N})`.
      teachers: the names that it looks up in its targets, other than "labels".
      kinds: of targets, some of "dense", "top_k" and "sampled". If left out, those that the
        objective does not refuse with a TypeError, an AttributeError or a NotImplementedError; the
        report says which it refused, and with what words.
      temperature: that the teachers' stored targets are made at, one for all or one for each.
      step: of training, for objectives with schedules.
      reference: `reference(logits_V, targets) -> float` in float64 NumPy for one token, where
        `targets` holds the "labels" entry (an int) and each teacher's logits [V]. It alone can
        tell a loss that is well behaved from the one that was meant.
      skip: names of properties.
      examples: the number of cases for each property and kind of targets.
      tolerance: absolute and relative difference that rounding may make.

    Returns:
      A report; `str` of it is a table of what holds and what was not tried, and why.

    Raises:
      PropertyError: properties that do not hold, each with the smallest failing case; it is an
        AssertionError, and its `report.failed` has their names.
      ValueError: a name in `skip` or `kinds` that does not exist, a teacher that the objective
        looks for and that `teachers` lacks, or no kind of targets that it takes.
      ImportError: hypothesis is not installed.
    """
    if not isinstance(temperature, Mapping):
        temperature = dict.fromkeys(teachers, temperature)
    temperatures = [{name: float(temperature.get(name, 1.0)) for name in teachers}]
    return _check(
        lambda _: objective,
        tuple(teachers),
        kinds,
        temperatures,
        skip,
        examples,
        is_divergence=False,
        reference=reference,
        tolerance=tolerance,
        step=step,
    )


def check_divergence(
    divergence: Callable[..., jax.Array],
    *,
    kinds: Sequence[str] | None = None,
    temperatures: Sequence[float] = (1.0, 2.0),
    reference: Callable[[np.ndarray, np.ndarray], float] | None = None,
    skip: Collection[str] = (),
    examples: int = 40,
    tolerance: float = 1e-4,
    **kwargs: Any,
) -> Report:
    """Tries every property in `PROPERTIES`: what an objective must have, and a divergence besides.

        def kl(p_V, q_V):
            return np.sum(p_V * np.log(p_V / q_V))

        print(testing.check_divergence(my_forward_kl, reference=kl))

    From inside nothing tells KL(p || q) from KL(q || p), or a divergence between distributions
    that were flattened once too often from the plain one: give the `reference`, which is one line
    of NumPy, and values are compared with it, over the vocabulary and over the ids and the bucket
    of `TopKTargets`.

    By their nature, total variation has no "zero gradient" (a kink), `adaptive_kl` no "numerical
    gradient" (weights behind `stop_gradient`) and no "top-k bucket" (it treats the bucket as no
    other outcome).

    Args:
      divergence: `divergence(student_logits, teacher, *, temperature=1.0) -> [...]`.
      kinds: see `check_objective`.
      temperatures: to draw from; the first serves for what does not depend on it.
      reference: `reference(p_V, q_V) -> float` for one token in float64 NumPy, where p_V is the
        teacher's distribution and q_V the student's, both at the temperature; T^2 is put in front.
      skip: see `check_objective`.
      examples: see `check_objective`.
      tolerance: see `check_objective`.
      **kwargs: passed to the divergence.

    Returns:
      See `check_objective`.

    Raises:
      PropertyError: see `check_objective`, as for the other errors.
    """

    def make(at: Mapping[str, float]) -> losses.Objective:
        return losses.distill("teacher", divergence, temperature=at["teacher"], **kwargs)

    return _check(
        make,
        ("teacher",),
        kinds,
        [{"teacher": float(temperature)} for temperature in temperatures],
        skip,
        examples,
        is_divergence=True,
        reference=reference,
        tolerance=tolerance,
        step=1,
    )


def _check(make, teachers, kinds, temperatures, skip, examples, **options) -> Report:
    cases.import_hypothesis()
    _refuse_unknown("skip", skip, PROPERTIES)
    _refuse_unknown("kinds", kinds or (), KINDS)
    mixes, accepted, refused = mixes_of_kinds(make, teachers, kinds, temperatures[0])
    options = {**options, "accepted": accepted, "skip": frozenset(skip)}
    subjects = [Subject(make, mix, temperatures, **options) for mix in mixes]
    found: dict[tuple[str, str], Result] = {}
    for name, prop in PROPERTIES.items():
        for subject in subjects:
            outcome, detail = _outcome(prop, subject, examples, found)
            key = name, subject.label
            found[key] = Result(name, prop.says, subject.label, outcome, detail)
    report = Report(tuple(found.values()), refused)
    if report.failed:
        raise PropertyError(report)
    return report


def _refuse_unknown(field: str, names: Collection[str], known: Collection[str]) -> None:
    if isinstance(names, str):
        raise ValueError(f"{field} must be several names, such as ({names!r},), got {names!r}")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{field} has no {unknown[0]!r}; there are: {', '.join(known)}")


def _outcome(
    prop: Property, subject: Subject, examples: int, found: Mapping[tuple[str, str], Result]
) -> tuple[str, str]:
    reason = _why_not(prop, subject, found)
    if reason is not None:
        return "skipped", reason
    # One smallest case a property is enough, and finding it is what takes time.
    known = any(r.name == prop.name and r.outcome == "failed" for r in found.values())
    failure = _search(prop, subject, examples, shrink=not known)
    return ("passed", "") if failure is None else ("failed", failure)


def _why_not(
    prop: Property, subject: Subject, found: Mapping[tuple[str, str], Result]
) -> str | None:
    """The reason not to try a property, or None."""
    if prop.name in subject.skip:
        return "by request"
    shape = found.get(("shape", subject.label))
    if shape is not None and shape.outcome == "failed":
        return "wants the right shape first"
    return prop.why_not(subject)


def _search(prop: Property, subject: Subject, examples: int, shrink: bool) -> str | None:
    """The smallest case on which a property fails, in words; None if there is none."""
    hypothesis = cases.import_hypothesis()
    shapes = [(tokens or jax.local_device_count(), size) for tokens, size in prop.shapes]
    temperatures = subject.temperatures[:1] if prop.one_temperature else subject.temperatures
    phases = [hypothesis.Phase.generate] + [hypothesis.Phase.shrink] * shrink
    failing: list[tuple[Case, Exception]] = []

    @hypothesis.settings(
        max_examples=min(examples, prop.examples),
        phases=phases,
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(cases.strategy(prop.values, shapes, temperatures, tuple(subject.kinds)))
    def attempt(case: Case) -> None:
        try:
            prop.check(subject, case)
        except Exception as error:
            failing.append((case, error))
            raise

    try:
        attempt()
    except hypothesis.errors.Flaky:
        case, error = failing[-1]
        return f"not the same every time: {_described(error)}\nin the case\n{case}"
    except Exception:
        if not failing:
            raise
        case, error = failing[-1]  # hypothesis ends with the smallest
        return f"{_described(error)}\nsmallest failing case: {case}"
    return None


def _described(error: Exception) -> str:
    if isinstance(error, AssertionError):
        return str(error)
    lines = str(error).strip().splitlines() or [""]
    return f"it raises {type(error).__name__}: {lines[0]}"
