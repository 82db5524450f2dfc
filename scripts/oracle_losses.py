"""Values and gradients of the losses, in float32, beside their definitions in float64 NumPy.

    python scripts/oracle_losses.py [--cases 10000] [--seed 0] [--json]

A case is one row: a student, a teacher and the parameters of one loss (temperatures 0.3 to 5, 2 to
300 outcomes, K from 1 to all of them). The definitions see the very numbers that the losses see,
bfloat16 ones included, and their gradients are derived by hand. LOG_FLOOR is part of a definition.

The error of a value is |value - exact| / max(|exact|, FLOOR u), and that of a gradient, by all of
the student's logits, max |gradient - exact| / max(max |exact|, FLOOR u'), where FLOOR is 0.1 and u
the loss's unit: T^2 for a divergence and T for its gradient, 1 for cross-entropy and DPO (beta for
DPO's gradient), (1 / 2 beta)^2 and 1 / beta for IPO. The floor is there because float32 has 24
bits: probabilities near 1 are known to 6e-8 at best, so a divergence of 1e-7 has no digits. Where
a loss is a difference of larger things the unit grows with them: the gradient of a reverse KL, made
of log-ratios, in proportion to that KL where it is above 1 nat (adaptive KL's too), and the value
of the alpha-beta divergence to the power sums that it subtracts. NaN and infinity are infinite
errors.

What has no single right answer in float32 is treated so:
- where p = q to rounding, total variation has a kink: any slope between its two sides' is right;
- where the teacher's cumulative mass meets `head_mass` to rounding, or p and q are so close that
  the share of the gap is noise, adaptive KL has to be finite and no more (such rows are counted);
- a bfloat16 gradient is rounded on its return: half a unit in its last place is not an error;
- how a bucket's gradient is shared within it is known to 2^-22 of the bucket's log-probability.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import math
import os
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import oracle_definitions
import rich.console
import rich.table
import scipy.special
from oracle_definitions import FLOOR, Group

from distill_jax import losses
from distill_jax.losses import policy, preference

NOISE = 1e-3
HUGE = 1e4

EDGES = (
    "plain",
    "equal",
    "near",
    "huge",
    "teacher -inf",
    "student -inf",
    "both -inf",
    "one-hot",
    "uniform",
)
DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "alpha_beta_divergence",
    "adaptive_kl",
    "total_variation",
    "gkd",
)
PREFERENCES = ("dpo", "robust_dpo", "ipo")
FUNCTIONS = {
    **{name: getattr(losses, name) for name in DIVERGENCES if name != "gkd"},
    "gkd": policy.gkd,
    "cross_entropy": losses.cross_entropy,
    **{name: getattr(preference, name) for name in PREFERENCES},
}


@dataclasses.dataclass
class Result:
    group: Group
    edges: np.ndarray
    value: np.ndarray
    gradient: np.ndarray
    unknown: int


def run(cases: int, seed: int) -> tuple[int, float]:
    """Holds `cases` rows against the definitions; returns their number and the worst error."""
    return _summary(measure(cases, seed))


def _summary(results: list[Result]) -> tuple[int, float]:
    worst = max(max(one.value.max(), one.gradient.max()) for one in results)
    return sum(len(one.edges) for one in results), float(worst)


def measure(cases: int, seed: int) -> list[Result]:
    groups = _groups(np.random.default_rng(seed))
    shares = [len(part) for part in np.array_split(np.arange(cases), len(groups))]
    jobs = [job for job in zip(groups, shares, range(len(groups))) if job[1]]
    # XLA compiles one program on one core, and most of the time is spent so.
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda job: _hold(job[0], job[1], [seed, job[2]]), jobs))


def _groups(rng: np.random.Generator) -> list[Group]:
    divergences_ = [name for name in DIVERGENCES if name != "gkd"]
    chosen = [(name, kind, False) for name in divergences_ for kind in ("dense", "top-k")]
    chosen += [(name, "dense", True) for name in divergences_]
    chosen += [(name, "top-k", index % 2 == 0) for index, name in enumerate(divergences_)]
    chosen += [("forward_kl", "sampled", half) for half in (False, False, True)]
    chosen += [("gkd", "dense", False), ("gkd", "top-k", False)]
    chosen += [("cross_entropy", "labels", half) for half in (False, False, True)]
    chosen += [(name, "pairs", False) for name in PREFERENCES]
    groups = []
    for index, (name, kind, half) in enumerate(chosen):
        size = 2 if kind == "pairs" else int(rng.choice([2, 3, 300, rng.integers(4, 300)]))
        ids = int(rng.choice([1, size, rng.integers(1, size + 1)]))
        groups.append(Group(name, kind, half, size, ids, _parameters(rng, name, kind, index)))
    return groups


def _parameters(rng: np.random.Generator, name: str, kind: str, index: int) -> dict[str, float]:
    between = rng.uniform
    own: dict[str, dict[str, float]] = {
        "jensen_shannon": {"beta": between(0.05, 0.95)},
        "gkd": {"beta": (0.0, 1.0)[index % 2]},
        "skewed_forward_kl": {"alpha": between(0.05, 0.95)},
        "skewed_reverse_kl": {"alpha": between(0.05, 0.95)},
        "alpha_beta_divergence": {"alpha": between(0.2, 1.2), "beta": between(0.2, 1.2)},
        "adaptive_kl": {"head_mass": between(0.2, 0.8)},
        "dpo": {"beta": between(0.02, 0.5), "label_smoothing": (0.0, 0.1)[index % 2]},
        "robust_dpo": {"beta": between(0.02, 0.5), "label_smoothing": 0.1},
        "ipo": {"beta": between(0.02, 0.5)},
        "cross_entropy": {
            "z_loss": (0.0, 1e-4, 1e-3)[index % 3],
            "label_smoothing": (0.0, 0.1)[index % 2],
        },
    }
    parameters = own.get(name, {})
    if kind in ("labels", "pairs"):
        return parameters
    return {**parameters, "temperature": float(math.exp(between(math.log(0.3), math.log(5))))}


def _hold(group: Group, rows: int, seed: list[int]) -> Result:
    rng = np.random.default_rng(seed)
    edges = rng.permutation(np.resize(np.asarray(EDGES), rows))
    student, teacher = _inputs(group, edges, rng)
    value, gradient = _ours(group, student, teacher)
    with np.errstate(divide="ignore", invalid="ignore"):
        exact = oracle_definitions.exact(group, student.astype(np.float64), teacher)
        value_unit, gradient_unit = group.units
        floor = np.maximum(np.abs(exact.value), FLOOR * value_unit * exact.value_size)
        value_error = np.abs(value - exact.value) / floor
        slack = exact.slack
        if group.half:  # 8 bits: half a unit is 2^-9 of the power of two above
            slack = slack + np.ldexp(1.0, np.frexp(gradient)[1] - 9)
        off = np.maximum(np.abs(gradient - exact.gradient) - slack, 0.0).max(-1)
        floor = FLOOR * gradient_unit * exact.gradient_size
        floor = np.maximum(np.abs(exact.gradient).max(-1), floor)
        gradient_error = off / floor
    finite = np.isfinite(value) & np.isfinite(gradient).all(-1)
    unknown = np.broadcast_to(exact.unknown, finite.shape)
    errors = (
        np.where(finite, np.where(unknown, 0.0, np.nan_to_num(error, nan=np.inf)), np.inf)
        for error in (value_error, gradient_error)
    )
    return Result(group, edges, *errors, int(unknown.sum()))


def _ours(group: Group, student: np.ndarray, teacher: Any) -> tuple[np.ndarray, np.ndarray]:
    function = FUNCTIONS[group.name]

    def loss(student, teacher):
        if group.kind != "pairs":
            return function(student, teacher, **group.parameters)
        return function(student[:, 0], student[:, 1], *teacher.T, **group.parameters)[0]

    @jax.jit
    def both(student, teacher):
        value, pullback = jax.vjp(lambda student: loss(student, teacher), student)
        return value, pullback(jnp.ones_like(value))[0]

    value, gradient = both(jnp.asarray(student), jax.tree.map(jnp.asarray, teacher))
    return np.asarray(value, np.float64), np.asarray(gradient, np.float64)


def _inputs(group: Group, edges: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, Any]:
    if group.kind == "pairs":
        return _pairs(edges, rng)
    student, teacher = _logits(edges, group.size, rng)
    if group.kind == "labels" and group.parameters["label_smoothing"]:
        student = np.where(np.isneginf(student), 0.0, student)  # infinite by definition
    dtype = jnp.bfloat16 if group.half else np.float32
    student, teacher = student.astype(dtype), teacher.astype(dtype)
    # Equal and nearly equal targets are made of the teacher, which is rounded like the student.
    log_p = scipy.special.log_softmax(teacher.astype(np.float64) / group.temperature, axis=-1)
    if group.kind == "top-k":
        return student, _top_k(log_p, group, rng)
    if group.kind == "sampled":
        return student, _sampled(log_p, group, rng)
    if group.kind == "labels":
        finite = np.where(np.isneginf(student.astype(np.float32)), -1.0, rng.random(student.shape))
        return student, finite.argmax(-1).astype(np.int32)
    return student, teacher


def _logits(edges: np.ndarray, size: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    shape = (len(edges), size)
    spread = np.exp(rng.uniform(np.log(0.3), np.log(6), (2, len(edges), 1)))
    student, teacher = spread * rng.normal(size=(2, *shape))
    student = np.where(_rows(edges, "equal"), teacher, student)
    student = np.where(_rows(edges, "near"), teacher + NOISE * rng.normal(size=shape), student)
    for index, side in enumerate((student, teacher)):
        extremes = rng.choice([-HUGE, HUGE], shape) + side
        anywhere = rng.uniform(-HUGE, HUGE, shape)
        huge = np.where(rng.random((len(edges), 1)) < 0.5, extremes, anywhere)
        # A third of the rows have one such side, a third the other one, a third both.
        mine = _rows(edges, "huge") & (rng.permutation(np.arange(len(edges)) % 3) != index)[:, None]
        side[:] = np.where(mine, huge, side)
        hot = np.arange(size) == rng.integers(size, size=(len(edges), 1))
        mine = _rows(edges, "one-hot") & (rng.random((len(edges), 1)) < 0.7)
        side[:] = np.where(mine, side + 40.0 * hot, side)
        mine = _rows(edges, "uniform") & (rng.random((len(edges), 1)) < 0.7)
        side[:] = np.where(mine, side[:, :1], side)
        ruled_out = rng.random(shape) < rng.uniform(0.1, 0.9, (len(edges), 1))
        ruled_out[np.arange(len(edges)), rng.integers(size, size=len(edges))] = False
        name = ("student", "teacher")[index]
        side[:] = np.where(ruled_out & _rows(edges, f"{name} -inf", "both -inf"), -np.inf, side)
    return student, teacher


def _rows(edges: np.ndarray, *names: str) -> np.ndarray:
    return np.isin(edges, names)[:, None]


def _top_k(log_p: np.ndarray, group: Group, rng: np.random.Generator) -> losses.TopKTargets:
    ids = np.argsort(-log_p, axis=-1)[:, : group.ids]
    rest = log_p.copy()
    np.put_along_axis(rest, ids, -np.inf, -1)
    log_probs = np.take_along_axis(log_p, ids, -1)
    padding = np.isneginf(log_probs) & (rng.random(ids.shape) < 0.5)
    with np.errstate(divide="ignore"):
        tail = scipy.special.logsumexp(rest, axis=-1)
    return losses.TopKTargets(
        np.where(padding, -1, ids).astype(np.int32),
        log_probs.astype(np.float32),
        tail.astype(np.float32),
        group.temperature,
    )


def _sampled(log_p: np.ndarray, group: Group, rng: np.random.Generator) -> losses.SampledTargets:
    draws = (log_p + rng.gumbel(size=(group.ids, *log_p.shape))).argmax(-1).T
    weights = rng.uniform(0.2, 1.8, draws.shape) / group.ids
    padding = rng.random(draws.shape) < 0.1
    return losses.SampledTargets(
        np.where(padding, -1, draws).astype(np.int32),
        np.where(padding, 0.0, weights).astype(np.float32),
        group.temperature,
    )


def _pairs(edges: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    reference = -np.exp(rng.uniform(0, 6, (len(edges), 2)))
    policy_ = reference + rng.normal(size=reference.shape) * 10
    policy_ = np.where(_rows(edges, "equal"), reference, policy_)
    policy_ = np.where(_rows(edges, "near"), reference + NOISE, policy_)
    far = rng.uniform(-HUGE, 0, reference.shape)
    long = _rows(edges, "huge")
    reference = np.where(long, far, reference)
    policy_ = np.where(long, far + 10 * rng.normal(size=far.shape), policy_)
    policy_[:, 0] -= HUGE * (long[:, 0] & (rng.random(len(edges)) < 0.5))
    return policy_.astype(np.float32), reference.astype(np.float32)


def show(results: list[Result], console: rich.console.Console) -> None:
    table = rich.table.Table(title="worst error, of value or gradient", title_justify="left")
    table.add_column("loss", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    for name in ("cases", "value", "gradient", *EDGES):
        table.add_column(name, justify="right")
    rows: dict[tuple[str, str], list[Result]] = {}
    for one in results:
        kind = one.group.kind + (" bf16" if one.group.half else "")
        rows.setdefault((one.group.name, kind), []).append(one)
    for labels, group in sorted(rows.items()):
        value, gradient = (
            np.concatenate([getattr(one, side) for one in group]) for side in ("value", "gradient")
        )
        edges = np.concatenate([one.edges for one in group])
        errors = np.maximum(value, gradient)
        by_edge = (errors[edges == edge].max(initial=0) for edge in EDGES)
        cells = [value.max(), gradient.max(), *by_edge]
        table.add_row(*labels, str(len(edges)), *(f"{cell:.0e}" for cell in cells))
    console.print(table)


def main() -> None:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of a table")
    args = parser.parse_args()
    results = measure(args.cases, args.seed)
    cases, worst = _summary(results)
    unknown = sum(one.unknown for one in results)
    if args.json:
        print(json.dumps({"cases": cases, "worst": worst, "only_finite": unknown}))
        return
    show(results, rich.console.Console(width=200))
    print(f"{cases} cases, {unknown} of them only for being finite; worst error {worst:.1e}")


if __name__ == "__main__":
    main()
