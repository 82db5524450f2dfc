"""How far a student's gradient from stored targets is from that of the whole distribution.

    python scripts/targets/quality.py [--quick] [--on smollm2 synthetic] [--tokens 100000] [--json]

With teacher p, student q and stored weights w, forward KL's gradient by a token's logits is q - p
from all logits and q - w from targets that sum to 1. "error" is the mean over tokens of |w - p|^2,
where w is all there is to a sampled token; for top-k targets, whose bucket is shared out as the
student does, w of an id outside is tail q / (sum of q outside). "gradient" is the same of what
`losses.forward_kl` makes of the targets: with weights that do not sum to 1, (sum of w) q - w.
"of mean" is the squared length of the mean of w - p over all tokens, the error in the gradient of
a bias of the logits: chance averages out, bias does not. A top-k "alone" is renormalised, without
its bucket.

Schemes are set up on other tokens than they are measured on (passages of train; another seed), to
keep the same mean number of ids, and to take the same bytes: those of a token, of an exact id and
of a sampled id, `BYTES` or yours. Nothing is rounded as a store does.

Bias: 200 redraws of a few tokens; of each the sum over tokens of what w says, less what p says, of
eight things that are linear in it: the mass of ids ranked 1, 2 to 3, 4 to 10, 11 to 100, 101 to
1000 and beyond, of even ids, and the student's cross-entropy. z is mean over standard error.

- smollm2: SmolLM2-135M-Instruct on held-out passages; the student lacks every fifth layer but the
  last, as one that was pruned in depth.
- synthetic: V = 128256, Zipf's law with an exponent drawn for each token; the student's logits are
  the teacher's plus noise that puts it 2 nats away, as far as a student in the middle of training.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
import scipy.special
from calibration import Calibration, Cost
from distributions import BATCH, Batch, smollm2, synthetic

from distill_jax import losses, teachers
from distill_jax.teachers import sampling, vocabulary

BYTES = {
    "top_k": Cost(4.2, 3.0, 3.0),
    "random_sampling": Cost(2.9, 1.5, 1.5),
    "threshold": Cost(3.1, 2.1, 1.4),
}
"""What stores take: SmolLM2 on passages, 12 to 16 ids a token, rows of 2048."""
IDS = (10, 15, 25)
BUDGET = 24.0
REDRAWS = 200
RANKS = (1, 3, 10, 100, 1000)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One scheme that is measured.

    Attributes:
      group: those to be compared, such as "10 ids".
      scheme: which.
      renormalised: of top-k, whether the ids are taken for all there is.
    """

    group: str
    scheme: teachers.Scheme
    renormalised: bool = False

    def targets(self, arrays: Mapping[str, Any]) -> losses.TopKTargets | losses.SampledTargets:
        targets = self.scheme.targets(self.scheme.unpack(arrays), 1.0)
        if not self.renormalised:
            return targets
        weights = scipy.special.softmax(targets.log_probs, axis=-1)
        return losses.SampledTargets(targets.ids, weights)

    @property
    def label(self) -> str:
        given = teachers.scheme_to_json(self.scheme).items()
        parts = (f"{k} {v:.4g}" for k, v in given if k != "name" and v is not None)
        return f"{self.scheme.name} {', '.join(parts)}{' alone' if self.renormalised else ''}"


def measure(
    *,
    quick: bool = False,
    on: tuple[str, ...] | None = None,
    tokens: int | None = None,
    costs: Mapping[str, Cost] = BYTES,
    budget: float = BUDGET,
    seed: int = 0,
) -> dict[str, Any]:
    """Figures of every distribution, and the worst of them.

    Args:
      quick: 512 tokens at 10 ids.
      on: which distributions; if left out both, and smollm2 alone if quick.
      tokens: how many of each; 100,000 of text and 4,096 of synthetic ones if left out.
      costs: of each scheme, by its name.
      budget: bytes a token at which schemes are compared too.
      seed: of everything that is drawn.

    Returns:
      {distribution: {"rows", "threshold_over_random", "bias_z"}, "mse_threshold_over_random" (the
      worst at 10 ids), "bias_z_max" (the largest of the unbiased schemes)}.
    """
    figures: dict[str, Any] = {}
    for name in on or (("smollm2",) if quick else ("synthetic", "smollm2")):
        default = 512 if quick else {"synthetic": 4096, "smollm2": 100_000}[name]
        source = {"synthetic": synthetic, "smollm2": smollm2}[name]
        calibration, batches = source(tokens or default, seed, 1024 if quick else 4096)
        entries = _entries(Calibration.of(calibration), costs, budget, quick)
        first = next(batches)
        rows = _errors(entries, itertools.chain([first], batches), costs, seed)
        figures[name] = {
            "rows": rows,
            "threshold_over_random": _ratios(rows),
            "bias_z": _bias(entries, first, 16 if quick else 32, seed),
        }
    at_ten = [one["threshold_over_random"]["10 ids"] for one in figures.values()]
    z = [max(one["bias_z"].values()) for one in figures.values()]
    return {**figures, "mse_threshold_over_random": max(at_ten), "bias_z_max": max(z)}


def _entries(
    calibration: Calibration, costs: Mapping[str, Cost], budget: float, quick: bool
) -> list[Entry]:
    """Every scheme at each mean number of ids, then at the budget of bytes."""
    one = Cost(0, 1, 1)
    made = []
    for ids in IDS[:1] if quick else IDS:
        schemes: list[teachers.Scheme] = [
            teachers.TopK(k=ids),
            calibration.random(one, ids),
            calibration.threshold(one, ids),
        ]
        schemes += [] if quick else [teachers.Threshold(ids=ids)]
        made.append(Entry(f"{ids} ids", schemes[0], renormalised=True))
        made += [Entry(f"{ids} ids", scheme) for scheme in schemes]
    if quick:
        return made
    left = {name: budget - cost.token for name, cost in costs.items()}
    schemes = [
        teachers.TopK(k=max(1, int(left["top_k"] / costs["top_k"].exact))),
        calibration.random(costs["random_sampling"], left["random_sampling"]),
        calibration.threshold(costs["threshold"], left["threshold"]),
    ]
    return made + [Entry(f"{budget:g} bytes", scheme) for scheme in schemes]


def _errors(
    entries: list[Entry],
    batches: Iterator[Batch],
    costs: Mapping[str, Cost],
    seed: int,
) -> list[dict[str, Any]]:
    """One line for every entry, means over all tokens."""
    sums = [0.0] * len(entries)
    together: list[Any] = [0.0] * len(entries)
    tokens = 0
    for index, (teacher_NV, student_NV) in enumerate(batches):
        keys_N = sampling.token_keys(jnp.array([seed, index], jnp.uint32), jnp.arange(BATCH))
        both = dense(teacher_NV, student_NV)
        for place, entry in enumerate(entries):
            arrays = _encode(entry.scheme, teacher_NV, keys_N)
            error_N, gradient_N, error_V = errors(entry.targets(arrays), both)
            exact_N = arrays.get("exact", arrays["length"])
            of_token = (error_N, gradient_N, arrays["length"], exact_N)
            sums[place] += np.array([np.sum(values) for values in of_token])
            together[place] += np.asarray(error_V, np.float64)
        tokens += len(teacher_NV)
    lines = []
    for entry, total, error_V in zip(entries, sums, together):
        error, gradient, ids, exact = total / tokens
        cost = costs[entry.scheme.name]
        lines.append(
            {
                "group": entry.group,
                "label": entry.label,
                "scheme": teachers.scheme_to_json(entry.scheme),
                "tokens": tokens,
                "ids": ids,
                "bytes": cost.token + cost.exact * exact + cost.sampled * (ids - exact),
                "error": error,
                "gradient": gradient,
                "mean_error": float(np.square(error_V / tokens).sum()),
            }
        )
    return lines


@functools.partial(jax.jit, static_argnums=0)
def _encode_on_device(scheme, logits_NV, keys_N):
    return scheme.encode(logits_NV, jnp.zeros(len(logits_NV), jnp.int32), keys_N, 1.0)


def _encode(scheme: teachers.Scheme, logits_NV: jax.Array, keys_N: jax.Array) -> dict[str, Any]:
    return jax.tree.map(np.asarray, _encode_on_device(scheme, logits_NV, keys_N))


class Dense(NamedTuple):
    """Probabilities of teacher and student, [N, V], and their products, [N]."""

    p_NV: jax.Array
    q_NV: jax.Array
    pp_N: jax.Array
    pq_N: jax.Array
    qq_N: jax.Array


@jax.jit
def dense(teacher_NV: jax.Array, student_NV: jax.Array) -> Dense:
    p_NV, q_NV = jax.nn.softmax(teacher_NV), jax.nn.softmax(student_NV)
    products = ((a * b).sum(-1) for a, b in ((p_NV, p_NV), (p_NV, q_NV), (q_NV, q_NV)))
    return Dense(p_NV, q_NV, *products)


@jax.jit
def errors(
    targets: losses.TopKTargets | losses.SampledTargets, of: Dense
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """|w - p|^2 and the squared error of `losses.forward_kl`'s gradient, [N]; sum of w - p, [V]."""
    p_NV, q_NV = of.p_NV, of.q_NV
    if isinstance(targets, losses.SampledTargets):
        weights = targets.weights
        p_NK, q_NK = (jnp.take_along_axis(x, targets.ids, axis=-1) for x in (p_NV, q_NV))
        kept_NK = jnp.where(weights > 0, p_NK, 0)
        error_N = of.pp_N + (jnp.square(weights - kept_NK) - jnp.square(kept_NK)).sum(-1)
        excess_N = weights.sum(-1) - 1
        along_N = (weights * q_NK).sum(-1) - of.pq_N
        gradient_N = error_N - 2 * excess_N * along_N + jnp.square(excess_N) * of.qq_N
        return error_N, gradient_N, (-p_NV.sum(0)).at[targets.ids].add(weights)
    clear = jax.vmap(lambda row, ids: row.at[ids].set(0.0))
    p_NV, q_NV = clear(p_NV, targets.ids), clear(q_NV, targets.ids)
    bucket_NV = q_NV * (jnp.exp(targets.log_tail) / q_NV.sum(-1))[:, None]
    error_N = jnp.square(bucket_NV - p_NV).sum(-1)
    return error_N, error_N, (bucket_NV - p_NV).sum(0)


def _ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Error with one tau for all over that of random sampling, by group."""
    found = {
        (row["group"], row["scheme"]["name"]): row["error"]
        for row in rows
        if row["scheme"].get("ids") is None
    }
    groups = dict.fromkeys(group for group, _ in found)
    return {g: found[g, "threshold"] / found[g, "random_sampling"] for g in groups}


def _bias(entries: list[Entry], batch: Batch, tokens: int, seed: int) -> dict[str, float]:
    """The largest |z| of every unbiased entry."""
    teacher_NV, student_NV = (np.asarray(x[:tokens]) for x in batch)
    functionals = _functionals(teacher_NV, student_NV)
    exact = scipy.special.softmax(teacher_NV.astype(np.float64), axis=-1)
    expected = np.array([(values * exact).sum() for values in functionals])
    together = BATCH // tokens
    repeated_NV = jnp.tile(teacher_NV, (together, 1))
    found = {}
    for entry in entries:
        if isinstance(entry.scheme, teachers.TopK):
            continue
        said = np.zeros((REDRAWS, len(functionals)))
        for start in range(0, REDRAWS, together):
            seeds = jnp.array([[seed, start + n] for n in range(together)], jnp.uint32)
            keys_N = jax.vmap(sampling.token_keys, (0, None))(seeds, jnp.arange(tokens)).ravel()
            arrays = entry.scheme.unpack(_encode(entry.scheme, repeated_NV, keys_N))
            for place, values in enumerate(functionals):
                picked = values[np.arange(BATCH)[:, None] % tokens, arrays["ids"]]
                sums = (arrays["weights"] * picked).reshape(together, -1).sum(-1)
                said[start : start + together, place] = sums
        # What is kept exactly has no deviation but float32's.
        deviation = np.maximum(said.std(axis=0, ddof=1), 1e-6 * tokens) / math.sqrt(REDRAWS)
        z = float(np.abs((said.mean(axis=0) - expected) / deviation).max())
        found[entry.label] = z
    return found


def _functionals(teacher_NV: np.ndarray, student_NV: np.ndarray) -> list[np.ndarray]:
    rank_NV = np.argsort(np.argsort(-teacher_NV, axis=-1), axis=-1)
    kind_NV = np.searchsorted(RANKS, rank_NV, side="right")
    made = [(kind_NV == kind).astype(np.float32) for kind in range(len(RANKS) + 1)]
    even_V = np.arange(teacher_NV.shape[1]) % 2 == 0
    made.append(np.broadcast_to(even_V.astype(np.float32), teacher_NV.shape))
    return [*made, -np.asarray(vocabulary.log_softmax(jnp.asarray(student_NV)))]


def show(figures: Mapping[str, Any], console: rich.console.Console) -> None:
    for name, one in figures.items():
        if not isinstance(one, dict):
            continue
        tokens = one["rows"][0]["tokens"]
        table = rich.table.Table(title=f"{name}, {tokens} tokens", title_justify="left")
        names = (
            "at",
            "scheme",
            "ids",
            "bytes",
            "error",
            "of random's",
            "gradient",
            "of mean",
            "|z|",
        )
        for column in names:
            table.add_column(column, justify="left" if column in names[:2] else "right")
        random = {r["group"]: r["error"] for r in one["rows"] if "draws" in r["scheme"]}
        for row in one["rows"]:
            z = one["bias_z"].get(row["label"])
            cells = (
                f"{row['ids']:.2f}",
                f"{row['bytes']:.1f}",
                f"{row['error']:.3e}",
                f"{row['error'] / random[row['group']]:.3f}",
                f"{row['gradient']:.3e}",
                f"{row['mean_error']:.2e}",
                "biased" if z is None else f"{z:.2f}",
            )
            table.add_row(row["group"], row["label"], *cells)
        console.print(table)


def main() -> None:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few hundred tokens")
    parser.add_argument("--on", nargs="+", choices=["synthetic", "smollm2"], default=None)
    parser.add_argument("--tokens", type=int, help="of each distribution")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of tables")
    args = parser.parse_args()
    on = tuple(args.on) if args.on else None
    figures = measure(quick=args.quick, on=on, tokens=args.tokens, seed=args.seed)
    if args.json:
        print(json.dumps(figures))
        return
    show(figures, rich.console.Console(width=120))


if __name__ == "__main__":
    main()
