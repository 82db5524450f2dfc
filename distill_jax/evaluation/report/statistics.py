"""Means, standard errors and paired differences over seeds, and training curves from files."""

import dataclasses
import json
import math
import os
import statistics
from collections.abc import Sequence

from etils import epath

from distill_jax.artifacts import InputError
from distill_jax.evaluation.report.contents import Curve


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
      mean: the mean.
      error: its standard error (sample deviation over sqrt n); None for a single value.
      values: what it is the mean of.
    """

    mean: float
    error: float | None
    values: tuple[float, ...]


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of values that differ by seed."""
    numbers = tuple(float(value) for value in values)
    if len(numbers) == 1:
        return Estimate(numbers[0], None, numbers)
    error = statistics.stdev(numbers) / math.sqrt(len(numbers))
    return Estimate(statistics.fmean(numbers), error, numbers)


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Mean and standard error of ours - theirs, seed by seed."""
    return estimate([a - b for a, b in zip(ours, theirs, strict=True)])


def read_curve(name: str, paths: Sequence[str | os.PathLike[str]]) -> Curve:
    """A curve from metrics files, one a seed: JSON lines with "step", "tokens" and figures.

    A step logged twice, as after a restart, counts once: its last line.

    Raises:
      InputError: a file is missing, or a line is not such an object.
    """
    return Curve(name=name, runs=[_read_run(epath.Path(path)) for path in paths])


def _read_run(path: epath.Path) -> dict[str, list[float]]:
    if not path.exists():
        raise InputError(f"{path}: no such file")
    by_step = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            by_step[record["step"]] = record
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path}:{number}: not a line of metrics with a step") from error
    records = [by_step[step] for step in sorted(by_step)]
    if not records:
        raise InputError(f"{path}: no metrics")
    shared = set.intersection(*(set(record) for record in records))
    if "tokens" not in shared:
        raise InputError(f'{path}: lines have no "tokens"')
    numeric = [name for name in sorted(shared) if isinstance(records[0][name], int | float)]
    return {name: [float(record[name]) for record in records] for name in numeric}
