"""The objective under check, compiled once per shape."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import losses
from distill_jax.testing import cases
from distill_jax.testing.cases import Case


def evaluate(objective: losses.Objective, logits, targets, where, step) -> tuple[dict, Any]:
    """Everything that properties look at: what is per token, and the totals over tokens."""

    def total(logits, targets):
        loss_N, terms = objective(logits, targets, step=step)
        totals = losses.reduce(loss_N, terms, where)
        return totals.loss, (loss_N, terms, totals)

    slopes, (loss_N, terms, totals) = jax.grad(total, (0, 1), has_aux=True, allow_int=True)(
        logits, targets
    )
    leaks = {
        name: sum(
            (
                jnp.sum(jnp.abs(leaf.reshape(leaf.shape[0], -1)), axis=-1)
                for leaf in jax.tree.leaves(slope)
                if leaf.dtype != jax.dtypes.float0
            ),
            jnp.zeros_like(loss_N),
        )
        for name, slope in slopes[1].items()
    }
    per_token = {"loss": loss_N, "terms": dict(terms), "gradient": slopes[0], "leaks": leaks}
    return per_token, totals.mean()


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What an objective gave, as NumPy arrays.

    Attributes:
      loss: [N].
      terms: each [N].
      gradient: [N, V], of the masked sum of the loss with respect to the logits.
      leaks: [N] by teacher, the size of the gradient that reaches its targets.
      mean: the masked mean of the loss and of each term, by `losses.reduce`.
    """

    loss: np.ndarray
    terms: dict[str, np.ndarray]
    gradient: np.ndarray
    leaks: dict[str, np.ndarray]
    mean: dict[str, np.ndarray]

    def per_token(self) -> dict[str, np.ndarray]:
        """What belongs to tokens, each with N first."""
        terms = {f"term {name}": term for name, term in self.terms.items()}
        return {"loss": self.loss, **terms, "gradient": self.gradient}


class Subject:
    """An objective, with targets of one kind for each teacher.

    Attributes:
      kinds: the kind of each teacher's targets.
      temperatures: those that cases have, by teacher.
      accepted: every kind of targets that all teachers of the objective may have at once.
      is_divergence: whether it is one divergence and nothing else.
      reference: float64 values to compare with, or None.
      skip: names of properties not to check.
      tolerance: what rounding may cost.
      step: of training.
    """

    def __init__(
        self,
        make: Callable[[Mapping[str, float]], losses.Objective],
        kinds: Mapping[str, str],
        temperatures: Sequence[Mapping[str, float]],
        *,
        accepted: frozenset[str],
        is_divergence: bool,
        reference: Callable[..., float] | None,
        skip: frozenset[str],
        tolerance: float,
        step: int,
    ):
        self._make = make
        self.step: Any = np.int32(step)
        self._compiled: dict[tuple, Callable] = {}
        self.kinds = dict(kinds)
        self.temperatures = tuple(temperatures)
        self.accepted = accepted
        self.is_divergence = is_divergence
        self.reference = reference
        self.skip = skip
        self.tolerance = tolerance

    @property
    def label(self) -> str:
        """The kinds of targets in a few letters."""
        return cases.label_of(self.kinds)

    def has(self, kind: str) -> bool:
        """Whether any teacher's targets are of this kind."""
        return kind in self.kinds.values()

    def objective(self, case: Case) -> losses.Objective:
        """The objective at a case's temperature."""
        return self._make(case.temperatures)

    def targets(self, case: Case) -> dict[str, Any]:
        """What the objective receives in this case."""
        return cases.targets_of(case, self.kinds)

    def compiled(self, name: str, case: Case, make: Callable[[losses.Objective], Callable]) -> Any:
        """`make(objective)`, made once per name and temperature."""
        key = (name, *sorted(case.temperatures.items()))
        if key not in self._compiled:
            self._compiled[key] = make(self.objective(case))
        return functools.partial(self._compiled[key], step=self.step)

    def run(self, case: Case, targets=None, *, logits=None, where=None) -> Outputs:
        """Values and gradients of a case, parts of which may be replaced."""
        logits = case.logits if logits is None else logits
        targets = self.targets(case) if targets is None else targets
        where = np.ones(logits.shape[0], np.float32) if where is None else where
        function = self.compiled(
            "run", case, lambda objective: _quickly_compiled(functools.partial(evaluate, objective))
        )
        return outputs(*function(logits, targets, where))


def _quickly_compiled(function: Callable) -> Callable:
    """`jax.jit`, but for the CPU without optimising code that runs on a handful of numbers."""
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(function, compiler_options=options)


def outputs(per_token: dict, mean: Any = (0.0, {})) -> Outputs:
    """Takes results off the device."""
    per_token, (loss, terms) = jax.tree.map(np.asarray, (per_token, mean))
    means = {"mean loss": loss, **{f"mean term {name}": term for name, term in terms.items()}}
    return Outputs(**per_token, mean=means)
