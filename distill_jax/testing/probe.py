"""Which kinds of targets an objective takes."""

import itertools
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from distill_jax import losses
from distill_jax.testing import cases
from distill_jax.testing.cases import KINDS, Case
from distill_jax.testing.report import PropertyError, Report, Result

Make = Callable[[Mapping[str, float]], losses.Objective]


def mixes_of_kinds(
    make: Make,
    teachers: Sequence[str],
    kinds: Sequence[str] | None,
    temperatures: Mapping[str, float],
) -> tuple[list[dict[str, str]], frozenset[str], dict[str, str]]:
    """Mixes of kinds, one for each teacher, that together try whatever each teacher may have.

    Returns:
      The mixes; the kinds that all teachers may have at once; what the objective said of those
      that none may have.

    Raises:
      ValueError: none at all.
      PropertyError: the objective cannot be traced.
    """
    every = itertools.product(kinds or KINDS, repeat=len(teachers))
    mixes = [dict(zip(teachers, mix, strict=True)) for mix in every]
    mixes.sort(key=lambda mix: len({*mix.values()}))  # alike first: few of them cover all
    answers = [_refusal(make, mix, temperatures, catch=kinds is None) for mix in mixes]
    taken = [mix for mix, answer in zip(mixes, answers, strict=True) if answer is None]
    alike = {
        next(iter(mix.values()), ""): answer
        for mix, answer in zip(mixes, answers, strict=True)
        if len({*mix.values()}) <= 1
    }
    said = {kind: answer for kind, answer in alike.items() if answer is not None}
    if not taken:
        reasons = "; ".join(f"{kind or 'labels'}: {answer}" for kind, answer in said.items())
        raise ValueError(f"the loss takes no kind of targets ({reasons})")
    chosen: list[dict[str, str]] = []
    covered: set[tuple[str, str]] = set()
    for mix in taken:
        if not chosen or mix.items() - covered:
            chosen.append(mix)
            covered |= mix.items()
    used = {kind for mix in taken for kind in mix.values()}
    refused = {kind: answer for kind, answer in said.items() if kind not in used}
    return chosen, frozenset(alike.keys() - said.keys()), refused


def _refusal(
    make: Make, mix: Mapping[str, str], temperatures: Mapping[str, float], catch: bool
) -> str | None:
    """What the objective says against some targets; None if it takes them."""
    tokens, vocabulary = cases.SHAPES[1]
    zeros = np.zeros((tokens, vocabulary), np.float32)
    labels, where = np.zeros(tokens, np.int32), np.ones(tokens, bool)
    case = Case(zeros, dict.fromkeys(mix, zeros), labels, where, temperatures, seed=0)
    objective = make(temperatures)

    def call(logits, targets, step):
        return objective(logits, targets, step=step)

    try:
        jax.make_jaxpr(call)(zeros, cases.targets_of(case, mix), np.int32(0))
    except jax.errors.JAXTypeError as error:
        label = cases.label_of(mix)
        says = "it can be compiled"
        result = Result("jit", says, label, "failed", str(error))
        raise PropertyError(Report((result,))) from error
    except KeyError as error:
        raise ValueError(
            f"the loss looks for targets {error}; there are: {', '.join(('labels', *mix))} "
            "(name its teachers by teachers=)"
        ) from error
    except (TypeError, AttributeError, NotImplementedError) as error:
        if catch:
            return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise
    except Exception as error:
        made = ", ".join(
            f"{name!r} {kind} at T = {temperatures[name]}" for name, kind in mix.items()
        )
        error.add_note(f"(the targets were: labels{', ' if made else ''}{made})")
        raise
    return None
