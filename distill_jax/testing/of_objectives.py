"""What must hold of every objective."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.testing import cases
from distill_jax.testing.cases import SHAPES, Case
from distill_jax.testing.properties import (
    Properties,
    expect_all_close,
    expect_close,
    needs_teacher,
)
from distill_jax.testing.subject import Subject

PROPERTIES = Properties()

_MIDDLE = SHAPES[1:2]


@PROPERTIES.add(
    "shape",
    "it returns (loss, terms), where the loss and every term hold one number a token: [N]",
    shapes=_MIDDLE,
    examples=1,
)
def _shape(subject: Subject, case: Case) -> None:
    def call(logits):
        return subject.objective(case)(logits, subject.targets(case), step=jnp.int32(0))

    out = jax.eval_shape(call, case.logits)
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], Mapping)):
        raise AssertionError(f"it returns {jax.tree.map(_kind, out)}, not (loss, dict of terms)")
    for name, array in {"loss": out[0], **out[1]}.items():
        if not hasattr(array, "shape") or array.shape != case.labels.shape:
            raise AssertionError(f"{name} is {_kind(array)}, must have shape {case.labels.shape}")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise AssertionError(f"{name} is {_kind(array)}, must be of floating point")


def _kind(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if hasattr(value, "shape") else repr(value)


@PROPERTIES.add(
    "dtype",
    "whatever the logits' dtype, the loss and its terms are float32 and the gradient is the "
    "logits'",
    shapes=_MIDDLE,
    examples=2,
    one_temperature=True,
)
def _dtype(subject: Subject, case: Case) -> None:
    for dtype in map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)):
        out = subject.run(case, logits=case.logits.astype(dtype))
        for name, array in out.per_token().items():
            wanted = dtype if name == "gradient" else jnp.dtype(jnp.float32)
            if array.dtype != wanted:
                raise AssertionError(f"{dtype} logits give {array.dtype} {name}, not {wanted}")


@PROPERTIES.add(
    "low precision",
    "bfloat16 and float16 logits give what the same numbers in float32 give, up to one rounding "
    "of the gradient: nothing is computed or added up in less than float32",
    shapes=_MIDDLE,
    one_temperature=True,
)
def _low_precision(subject: Subject, case: Case) -> None:
    for dtype in map(jnp.dtype, (jnp.bfloat16, jnp.float16)):
        low = subject.run(case, logits=case.logits.astype(dtype))
        full = subject.run(case, logits=case.logits.astype(dtype).astype(np.float32))
        expect_close(low.loss, full.loss, f"loss of {dtype} logits", subject.tolerance)
        size = 1.0 + np.abs(full.gradient).max(initial=0.0)  # parts may cancel after rounding
        rounding = 4 * float(jnp.finfo(dtype).eps) * size + subject.tolerance
        expect_close(low.gradient, full.gradient, f"gradient of {dtype} logits", rounding)


def _finite(subject: Subject, case: Case) -> None:
    for name, array in subject.run(case).per_token().items():
        wrong = np.argwhere(~np.isfinite(array))
        if len(wrong):
            index = tuple(map(int, wrong[0]))
            raise AssertionError(f"{name}{list(index)} is {array[index]}")


PROPERTIES.add(
    "large logits", "logits of up to +-1e4 give a finite loss and gradient", values="large"
)(_finite)
PROPERTIES.add(
    "-inf in student",
    "logits of -inf in the student give a finite loss and gradient, or one token would spoil the "
    "batch",
    values="-inf in student",
)(_finite)
PROPERTIES.add(
    "-inf in teacher",
    "logits of -inf, or the lowest number, in the teacher give a finite loss and gradient",
    values="-inf in teacher",
    why_not=needs_teacher,
)(_finite)
PROPERTIES.add(
    "-inf in both",
    "the same logits of -inf, or the lowest number, on both sides give a finite loss and gradient",
    values="-inf in both",
    why_not=needs_teacher,
)(_finite)


@PROPERTIES.add(
    "padded vocabulary",
    "an entry that every side rules out by a logit of -inf changes nothing",
    shapes=_MIDDLE,
    one_temperature=True,
)
def _padded_vocabulary(subject: Subject, case: Case) -> None:
    def widened(array: Any) -> np.ndarray:
        return np.pad(array, ((0, 0), (0, 1)), constant_values=-np.inf)

    targets = subject.targets(case)
    wide = {n: widened(t) if subject.kinds.get(n) == "dense" else t for n, t in targets.items()}
    out = subject.run(case, wide, logits=widened(case.logits))
    clean = subject.run(case, targets)
    expect_close(out.loss, clean.loss, "loss with one more entry", subject.tolerance)
    gradient = np.pad(clean.gradient, ((0, 0), (0, 1)))
    expect_close(out.gradient, gradient, "gradient with one more entry", subject.tolerance)


@PROPERTIES.add(
    "numerical gradient",
    "the gradient is the slope of the loss, the teacher being constant (where the loss has a "
    "kink: between its slopes on both sides)",
)
def _numerical_gradient(subject: Subject, case: Case) -> None:
    out, targets, step = subject.run(case), subject.targets(case), 2.0**-6

    def rise(index: tuple[int, ...], by: float) -> float:
        logits = case.logits.copy()
        logits[index] += by
        change = subject.run(case, targets, logits=logits).loss.astype(np.float64) - out.loss
        return float(change.sum()) / by

    for index in np.ndindex(case.logits.shape):
        slope, sides = float(out.gradient[index]), (rise(index, -step), rise(index, step))
        margin = 100 * subject.tolerance * (1 + abs(slope))
        if not min(sides) - margin <= slope <= max(sides) + margin:
            raise AssertionError(
                f"gradient{list(index)} is {slope:.6g}, but the loss rises at {np.mean(sides):.6g}"
            )


@PROPERTIES.add(
    "teacher gradient", "no gradient reaches what the teacher said", why_not=needs_teacher
)
def _teacher_gradient(subject: Subject, case: Case) -> None:
    for name, leak in subject.run(case).leaks.items():
        expect_close(leak, np.zeros_like(leak), f"gradient that reaches {name!r}, at token ", 0.0)


# Tokens


@PROPERTIES.add(
    "masked tokens",
    "tokens that losses.reduce masks change nothing, be their logits NaN or their labels -100",
)
def _masked_tokens(subject: Subject, case: Case) -> None:
    where, targets = case.where.astype(np.float32), subject.targets(case)
    clean = subject.run(case, targets, where=where)
    unlabelled = {**targets, "labels": np.where(case.where, case.labels, -100).astype(np.int32)}
    out = subject.run(case, unlabelled, where=where)
    note = " with masked labels of -100"
    expect_all_close(out.mean, clean.mean, note, subject.tolerance)
    gradient = np.where(case.where[:, None], clean.gradient, 0.0)
    expect_close(out.gradient, gradient, f"gradient{note}", subject.tolerance)

    def spoilt(leaf: Any) -> np.ndarray:
        kept = case.where.reshape(-1, *[1] * (np.ndim(leaf) - 1))
        return np.where(kept, leaf, np.float32(np.nan)) if leaf.dtype == np.float32 else leaf

    logits, unknown = jax.tree.map(spoilt, (case.logits, unlabelled))
    out = subject.run(case, unknown, logits=logits, where=where)
    note = " with NaN in masked tokens"
    expect_all_close(out.mean, clean.mean, note, subject.tolerance)
    kept = {"gradient": clean.gradient[case.where]}
    expect_all_close({"gradient": out.gradient[case.where]}, kept, note, subject.tolerance)


@PROPERTIES.add(
    "mask equals subset",
    "reducing with a mask equals reducing the tokens that are left",
    shapes=_MIDDLE,
    one_temperature=True,
)
def _mask_equals_subset(subject: Subject, case: Case) -> None:
    tokens, targets = len(case.labels), subject.targets(case)
    kept = np.sort(case.rng().permutation(tokens)[: tokens // 2])
    where = np.isin(np.arange(tokens), kept).astype(np.float32)
    masked = subject.run(case, targets, where=where)
    subset = subject.run(case, cases.rows(targets, kept), logits=case.logits[kept])
    note = f" of tokens {kept.tolist()}"
    expect_all_close(masked.mean, subset.mean, note, subject.tolerance)
    expect_close(masked.gradient[kept], subset.gradient, f"gradient{note}", subject.tolerance)


@PROPERTIES.add(
    "independent tokens",
    "a token's loss and gradient do not change when other tokens do",
    shapes=SHAPES[1:],
)
def _independent_tokens(subject: Subject, case: Case) -> None:
    rng = case.rng()

    def changed(array: np.ndarray) -> np.ndarray:
        new = (rng.integers(-40, 41, array.shape) / 8).astype(np.float32)
        return np.concatenate([array[:1], new[1:]])

    labels = rng.integers(0, case.logits.shape[1], case.labels.shape).astype(np.int32)
    other = dataclasses.replace(
        case,
        logits=changed(case.logits),
        teachers={name: changed(teacher) for name, teacher in case.teachers.items()},
        labels=np.concatenate([case.labels[:1], labels[1:]]),
    )
    before, targets = subject.targets(case), subject.targets(other)
    # What was sampled for the first token must stay too.
    targets = jax.tree.map(lambda old, new: np.concatenate([old[:1], new[1:]]), before, targets)
    first = cases.rows(subject.run(case, before).per_token(), slice(1))
    out = subject.run(other, targets)
    note = " when the other tokens change:"
    expect_all_close(cases.rows(out.per_token(), slice(1)), first, note, subject.tolerance)


@PROPERTIES.add("token order", "a token's loss does not depend on its place", shapes=SHAPES[1:])
def _token_order(subject: Subject, case: Case) -> None:
    order, targets = case.rng().permutation(len(case.labels)), subject.targets(case)
    out = subject.run(case, cases.rows(targets, order), logits=case.logits[order])
    expected = cases.rows(subject.run(case, targets).per_token(), order)
    note = f" with tokens in the order {order.tolist()}:"
    expect_all_close(out.per_token(), expected, note, subject.tolerance)


# Vocabulary


@PROPERTIES.add(
    "vocabulary order", "numbering the vocabulary otherwise, in all inputs alike, changes nothing"
)
def _vocabulary_order(subject: Subject, case: Case) -> None:
    order, targets = case.rng().permutation(case.logits.shape[1]), subject.targets(case)
    new_id = np.argsort(order).astype(np.int32)

    def renumbered(name: str, of: Any) -> Any:
        if name == "labels":
            return new_id[of]
        if subject.kinds[name] == "dense":
            return of[:, order]
        return dataclasses.replace(of, ids=new_id[of.ids])

    changed = {name: renumbered(name, of) for name, of in targets.items()}
    out = subject.run(case, changed, logits=case.logits[:, order])
    expected = subject.run(case, targets).per_token()
    expected["gradient"] = expected["gradient"][:, order]
    note = f" with entry i of the vocabulary being what was {order.tolist()}[i]:"
    expect_all_close(out.per_token(), expected, note, subject.tolerance)


@PROPERTIES.add(
    "constant shift",
    "adding a constant to all of a token's logits, the student's or the teacher's, changes nothing",
)
def _constant_shift(subject: Subject, case: Case) -> None:
    def shift() -> np.ndarray:
        # Integers, which are added without rounding to logits that are multiples of 1/1024.
        return case.rng().integers(-20, 21, (len(case.labels), 1)).astype(np.float32)

    targets = subject.targets(case)
    expected = subject.run(case, targets).per_token()
    out = subject.run(case, targets, logits=case.logits + shift())
    note = f" with {shift().tolist()} added to the student's logits:"
    expect_all_close(out.per_token(), expected, note, subject.tolerance)
    for name, kind in subject.kinds.items():
        if kind == "dense":
            shifted = {**targets, name: targets[name] + shift()}
            note = f" with {shift().tolist()} added to the logits of {name!r}:"
            out = subject.run(case, shifted)
            expect_all_close(out.per_token(), expected, note, subject.tolerance)


@PROPERTIES.add(
    "reference",
    "the loss is what the reference says, in float64",
    why_not=lambda subject: _no_reference(subject),
)
def _reference(subject: Subject, case: Case) -> None:
    out = subject.run(case).loss
    expected = [_reference_value(subject, case, token) for token in range(len(out))]
    expect_close(out, expected, "loss", subject.tolerance)


def _no_reference(subject: Subject) -> str | None:
    if subject.reference is None:
        return "none was given"
    if subject.has("sampled"):
        return "the value of sampled targets is not that of the teacher"
    if subject.has("top_k") and not subject.is_divergence:
        return "it is one for logits"
    if subject.has("top_k") and "top-k bucket" in subject.skip:
        return "of top-k targets it has another bucket"
    return None


def _reference_value(subject: Subject, case: Case, token: int) -> float:
    assert subject.reference is not None
    student = case.logits[token].astype(np.float64)
    if not subject.is_divergence:
        teachers = {name: array[token].astype(float) for name, array in case.teachers.items()}
        return subject.reference(student, {"labels": int(case.labels[token]), **teachers})
    ((name, temperature),) = case.temperatures.items()
    p, q = (cases.softmax(side[token], temperature) for side in (case.teachers[name], case.logits))
    if subject.has("top_k"):
        ids = subject.targets(case)[name].ids[token]
        p, q = cases.coarsened(p, ids), cases.coarsened(q, ids)
    return temperature**2 * subject.reference(p, q)
