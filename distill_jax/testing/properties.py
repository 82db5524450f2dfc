"""What a property is, and how its function says that it does not hold."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from distill_jax.testing.cases import SHAPES, Case
from distill_jax.testing.subject import Subject

Check = Callable[[Subject, Case], None]


@dataclasses.dataclass(frozen=True)
class Property:
    """Something that must hold of a loss, and the cases to try it on.

    Attributes:
      name: what reports and `skip` call it.
      says: what must hold, in plain words.
      check: raises AssertionError where it does not hold.
      values: the kind of logits, see `cases.strategy`.
      shapes: tokens and vocabulary; 0 tokens stand for one on each device.
      examples: how many cases at most.
      one_temperature: whether to stay at the first temperature.
      why_not: the reason for which a subject cannot have the property, or None.
    """

    name: str
    says: str
    check: Check
    values: str = "plain"
    shapes: Sequence[tuple[int, int]] = SHAPES
    examples: int = 1000
    one_temperature: bool = False
    why_not: Callable[[Subject], str | None] = lambda subject: None


class Properties(dict[str, Property]):
    """Properties by name, in the order in which they are tried."""

    def add(self, name: str, says: str, **options: Any) -> Callable[[Check], Check]:
        """Registers the function that it decorates as a property."""

        def register(check: Check) -> Check:
            self[name] = Property(name, says, check, **options)
            return check

        return register


def needs_teacher(subject: Subject) -> str | None:
    """The reason not to check an objective that has no teacher."""
    return None if subject.kinds else "it has no teacher"


def expect_close(actual: Any, expected: Any, what: str, tolerance: float) -> None:
    """Raises AssertionError, naming the first element that is off by more than rounding."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape != expected.shape:
        raise AssertionError(f"{what} has shape {actual.shape}, must have {expected.shape}")
    wrong = np.argwhere(~np.isclose(actual, expected, rtol=tolerance, atol=tolerance))
    if len(wrong):
        index = tuple(map(int, wrong[0]))
        place = str(list(index)) if index else ""
        raise AssertionError(f"{what}{place} is {actual[index]:.6g}, must be {expected[index]:.6g}")


def expect_all_close(
    actual: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    note: str,
    tolerance: float,
) -> None:
    """`expect_close` for each named array."""
    for name, array in expected.items():
        expect_close(actual[name], array, f"{name}{note}", tolerance)
