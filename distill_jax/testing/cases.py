"""Small inputs to try a loss on: what hypothesis draws, and shrinks when a property fails."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import losses

SHAPES = ((1, 2), (2, 4), (4, 9))
"""Tokens and vocabulary. They are few because every shape is compiled once."""

KINDS = ("dense", "top_k", "sampled")
"""What a teacher's targets may be: logits, `TopKTargets`, `SampledTargets`."""

LOWEST = float(jnp.finfo(jnp.bfloat16).min)
"""What many programs write over a logit instead of -inf."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One input of an objective.

    Attributes:
      logits: float32 [N, V], the student's.
      teachers: float32 [N, V] logits of each teacher; stored targets are made of them.
      labels: int32 [N].
      where: bool [N], the mask for properties about masks.
      temperatures: of each teacher's stored targets, and of a divergence under check.
      seed: of whatever else a property draws, such as samples and permutations.
    """

    logits: np.ndarray
    teachers: Mapping[str, np.ndarray]
    labels: np.ndarray
    where: np.ndarray
    temperatures: Mapping[str, float]
    seed: int

    def rng(self) -> np.random.Generator:
        """A fresh generator, the same every time."""
        return np.random.default_rng(self.seed)

    def __str__(self) -> str:
        tokens, vocabulary = self.logits.shape
        distinct = {*self.temperatures.values()}
        shown = next(iter(distinct)) if len(distinct) == 1 else dict(self.temperatures)
        head = f"N = {tokens}, V = {vocabulary}, seed = {self.seed}" + (
            f", temperature = {shown}" if distinct else ""
        )
        arrays = {"logits": self.logits, **self.teachers, "labels": self.labels}
        return "\n".join([head, *map(_shown, {**arrays, "where": self.where}.items())])


def _shown(named: tuple[str, np.ndarray]) -> str:
    name, array = named
    text = np.array2string(array, precision=5, separator=", ", max_line_width=90)
    return f"{name} = " + text.replace("\n", "\n" + " " * (len(name) + 3))


def import_hypothesis() -> Any:
    """The one optional dependency of this room, wanted only when a check runs."""
    try:
        import hypothesis
    except ImportError as error:
        raise ImportError("distill_jax.testing needs hypothesis: pip install hypothesis") from error
    return hypothesis


def strategy(
    values: str,
    shapes: Sequence[tuple[int, int]],
    temperatures: Sequence[Mapping[str, float]],
    teachers: Sequence[str],
) -> Any:
    """Cases of some shapes at some temperatures.

    Args:
      values: "plain", "large" (up to +-1e4), or "-inf in student", "-inf in teacher" and
        "-inf in both", where each token keeps a finite logit at its label at least: a label that
        is ruled out costs infinitely much by definition.
      shapes: to choose from.
      temperatures: to choose from.
      teachers: their names.
    """
    st = import_hypothesis().strategies

    @st.composite
    def cases(draw):
        tokens, vocabulary = draw(st.sampled_from(shapes))

        def numbers(*shape):
            # Bytes are far quicker to draw than as many numbers, and shrink to 0 one by one.
            size = int(np.prod(shape))
            drawn = draw(st.binary(min_size=size, max_size=size))
            return np.frombuffer(drawn, np.uint8).reshape(shape).astype(np.int32)

        def logits():
            drawn = numbers(tokens, vocabulary)
            if values == "large":
                return _LARGE[drawn % len(_LARGE)]
            return np.where(drawn % 2, -(drawn + 1) / 32, drawn / 32).astype(np.float32)

        student = logits()
        named = {name: logits() for name in teachers}
        if named and values != "large" and draw(st.booleans()):  # a student that has learnt
            student = student / 4 + next(iter(named.values()))
        # Off the teachers' grid, so that p = q, where total variation and others have a kink and
        # rounding decides the slope, is not met by chance; on a grid that sums of integers keep.
        student = student + np.arange(vocabulary, dtype=np.float32) * np.float32(3 / 1024)
        labels = numbers(tokens) % vocabulary
        if values.startswith("-inf"):
            ruled_out = numbers(tokens, vocabulary) % 2 == 1
            ruled_out[np.arange(tokens), labels] = False
            lowest = values != "-inf in student" and draw(st.booleans())
            floor = np.float32(LOWEST if lowest else -np.inf)
            if values != "-inf in teacher":
                student = np.where(ruled_out, floor, student)
            if values != "-inf in student":
                named = {name: np.where(ruled_out, floor, of) for name, of in named.items()}
        where = numbers(tokens) % 2 == 1
        temperature = draw(st.sampled_from(temperatures))
        return Case(student, named, labels, where, temperature, draw(st.integers(0, 999)))

    return cases()


_LARGE = np.asarray([0.0, 1.0, -1.0, 5.0, 1e4, -1e4], np.float32)


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Probabilities along the last axis, in float64."""
    scaled = np.asarray(logits, np.float64) / temperature
    odds = np.exp(scaled - scaled.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


def coarsened(p: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Probabilities [N, K + 1] of some ids [N, K] and of all others together."""
    rest = p.copy()
    np.put_along_axis(rest, ids, 0.0, -1)
    return np.concatenate([np.take_along_axis(p, ids, -1), rest.sum(-1, keepdims=True)], -1)


def likeliest(teacher: np.ndarray, k: int) -> Any:
    """The K likeliest ids of each token, [N, K]."""
    return np.argsort(-teacher, axis=-1, kind="stable")[..., :k].astype(np.int32)


def top_k(teacher: np.ndarray, k: int, temperature: float) -> losses.TopKTargets:
    """The exact top-k targets of some logits [N, V]."""
    ids = likeliest(teacher, k)
    with np.errstate(divide="ignore"):
        logs: Any = np.log(coarsened(softmax(teacher, temperature), ids)).astype(np.float32)
    return losses.TopKTargets(ids, logs[..., :-1], logs[..., -1], temperature)


def sampled(
    teacher: np.ndarray, draws: int, temperature: float, rng: np.random.Generator
) -> losses.SampledTargets:
    """Draws with replacement from some logits [N, V], each of weight 1 / draws."""
    p = softmax(teacher, temperature)
    ids: Any = np.stack([rng.choice(p.shape[-1], size=draws, p=row) for row in p]).astype(np.int32)
    weights: Any = np.full(ids.shape, 1.0 / draws, np.float32)
    return losses.SampledTargets(ids, weights, temperature)


def stored_ids(vocabulary: int) -> int:
    """K of the stored targets that cases have: 1, 2 and 4 of 2, 4 and 9."""
    return vocabulary // 2


def targets_of(case: Case, kinds: Mapping[str, str], k: int | None = None) -> dict[str, Any]:
    """What an objective receives: "labels", and each teacher's targets of some kind.

    Args:
      case: the logits to make them of.
      kinds: the kind of each teacher.
      k: ids in stored targets, `stored_ids` of them if left out.
    """
    k = k or stored_ids(case.logits.shape[1])
    rng = case.rng()
    targets: dict[str, Any] = {"labels": case.labels}
    for name, kind in kinds.items():
        teacher, temperature = case.teachers[name], case.temperatures[name]
        if kind == "dense":
            targets[name] = teacher
        elif kind == "top_k":
            targets[name] = top_k(teacher, k, temperature)
        else:
            targets[name] = sampled(teacher, k, temperature, rng)
    return targets


def label_of(kinds: Mapping[str, str]) -> str:
    """A teacher's kind of targets, or that of each of several, in a few letters."""
    if len({*kinds.values()}) > 1:
        return " ".join(f"{name}={kind}" for name, kind in kinds.items())
    return next(iter(kinds.values()), "labels")


def rows(tree: Any, index: Any) -> Any:
    """The same tokens of every array."""
    return jax.tree.map(lambda leaf: leaf[index], tree)
