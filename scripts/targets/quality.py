"""How far a student's gradient from stored targets is from that of the whole distribution.

    python scripts/targets/quality.py [--quick] [--on smollm2 synthetic] [--tokens 100000] [--json]
    python scripts/targets/quality.py --on smollm2 --work runs/quality --out targets.png

With teacher p, student q and stored weights w, forward KL's gradient by a token's logits is q - p
from all logits and q - w from targets that sum to 1. "error" is the mean over tokens of |w - p|^2,
where w is all there is to a sampled token; for top-k targets, whose bucket is shared out as the
student does, w of an id outside is tail q / (sum of q outside). "gradient" is the same of what
`losses.forward_kl` makes of the targets: with weights that do not sum to 1, (sum of w) q - w.
"of mean" is the squared length of the mean of w - p over all tokens, the error in the gradient of
a bias of the logits: chance averages out, bias does not. A top-k "alone" is renormalised, without
its bucket. "of random's" is followed by its standard error over parts of 2048 tokens.

"bytes" are a token's in records of the store's codec, of 2048 tokens each; keys and frames add 0.2.
Schemes are set up on other tokens than they are measured on (passages of train; another seed): to
keep the same mean number of ids, and to take the same bytes, with the codec on both. The errors are
of what is given to the codec, not of what it rounds.

Bias: 200 redraws of a few tokens; of each the sum over tokens of what w says, less what p says, of
eight things that are linear in it: the mass of ids ranked 1, 2 to 3, 4 to 10, 11 to 100, 101 to
1000 and beyond, of even ids, and the student's cross-entropy. z is mean over standard error.

- smollm2: SmolLM2-135M-Instruct on held-out passages; the student lacks every fifth layer but the
  last, as one that was pruned in depth.
- synthetic: V = 128256, the teacher of `problem.py`; the student's logits are the teacher's plus
  noise that puts it 2 nats away, as far as a student in the middle of training.
"""

import argparse
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import rich.console
import rich.table
from bias import bias
from calibration import NAMES, Calibration
from distributions import SOURCES, Source
from errors import Entry
from measured import Measured
from picture import draw

from distill_jax import progress, teachers

IDS = (10, 15, 25)
BUDGET = 24.0
RECORD = 2048
TOKENS = {"synthetic": 4096, "smollm2": 100_000}
"""Measured if not told otherwise."""
SUBJECTS = {
    "synthetic": "A synthetic teacher of 128,256 ids",
    "smollm2": "SmolLM2-135M on held-out passages: teacher p, stored weights w",
}
"""What the picture is of."""


class Unfinished(Exception):
    """The time is up; the same call goes on."""


def measure(
    *,
    quick: bool = False,
    on: tuple[str, ...] | None = None,
    tokens: int | None = None,
    budget: float = BUDGET,
    seed: int = 0,
    work: pathlib.Path | None = None,
    minutes: float = math.inf,
) -> dict[str, Any]:
    """Figures of every distribution, and the worst of them.

    Args:
      quick: 512 tokens at 10 ids.
      on: which distributions; if left out both, and smollm2 alone if quick.
      tokens: how many of each, in whole records; `TOKENS` if left out.
      budget: bytes a token at which schemes are compared too.
      seed: of everything that is drawn.
      work: a directory that keeps what is measured; a later call goes on from there.
      minutes: after which to stop, if there is more to do.

    Returns:
      {distribution: {"rows", "threshold_over_random", "bias_z"}, "mse_threshold_over_random" (the
      worst at 10 ids), "bias_z_max" (the largest of the unbiased schemes)}.

    Raises:
      Unfinished: time was up.
    """
    deadline = time.monotonic() + 60 * minutes
    figures: dict[str, Any] = {}
    for name in on or (("smollm2",) if quick else tuple(SOURCES)):
        record = 512 if quick else RECORD
        records = -(-(tokens or (record if quick else TOKENS[name])) // record)
        source: Source = SOURCES[name](seed)
        measured = Measured.begin(
            work and work / f"{name}.npz",
            {"on": name, "seed": seed, "budget": budget, "record": record},
            source.token_counts,
            lambda source=source: _entries(source, budget, quick),
        )
        with progress.bar(name, records, unit="records", done=len(measured.sums_UES)) as bar:
            while len(measured.sums_UES) < records:
                if time.monotonic() > deadline:
                    raise Unfinished(f"{name}: {measured.tokens} of {records * record} tokens")
                measured.add(source.batches("held_out", measured.tokens, record))
                bar.advance(tokens=record)
        first = next(source.batches("held_out", 0, record))
        rows = measured.rows()
        figures[name] = {
            "rows": rows,
            "threshold_over_random": {
                row["group"]: row["of_random"] for row in rows if row["scheme"].get("tau")
            },
            "bias_z": bias(measured.entries, first, 16 if quick else 32, seed),
        }
    at_ten = [one["threshold_over_random"]["10 ids"] for one in figures.values()]
    z = [max(one["bias_z"].values()) for one in figures.values()]
    return {**figures, "mse_threshold_over_random": max(at_ten), "bias_z_max": max(z)}


def _entries(source: Source, budget: float, quick: bool) -> list[Entry]:
    """Every scheme at each mean number of ids, then at the budget of bytes."""
    some = source.batches("train", 0, 1024 if quick else 2 * RECORD)
    calibration = Calibration(some, source.token_counts)
    made = []
    for ids in IDS[:1] if quick else IDS:
        schemes = [calibration.at_ids(name, ids) for name in NAMES]
        schemes += [] if quick else [teachers.Threshold(ids=ids)]
        made.append(Entry(f"{ids} ids", schemes[0], alone=True))
        made += [Entry(f"{ids} ids", scheme) for scheme in schemes]
    if quick:
        return made
    schemes = [calibration.at_bytes(name, budget, IDS[:2]) for name in NAMES]
    return made + [Entry(f"{budget:g} bytes", scheme) for scheme in schemes]


def show(figures: Mapping[str, Any], console: rich.console.Console) -> None:
    names = ("at", "scheme", "ids", "bytes", "error", "of random's", "gradient", "of mean", "|z|")
    for name, one in figures.items():
        if not isinstance(one, dict):
            continue
        tokens = one["rows"][0]["tokens"]
        table = rich.table.Table(title=f"{name}, {tokens} tokens", title_justify="left")
        for column in names:
            table.add_column(column, justify="left" if column in names[:2] else "right")
        for row in one["rows"]:
            z, uncertain = one["bias_z"].get(row["label"]), row["of_random_error"]
            cells = (
                f"{row['ids']:.2f}",
                f"{row['bytes']:.1f}",
                f"{row['error']:.3e}",
                f"{row['of_random']:.3f}" + ("" if uncertain is None else f" ± {uncertain:.3f}"),
                f"{row['gradient']:.3e}",
                f"{row['mean_error']:.2e}",
                "biased" if z is None else f"{z:.2f}",
            )
            table.add_row(row["group"], row["label"], *cells)
        console.print(table)


def main() -> int:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few hundred tokens")
    parser.add_argument("--on", nargs="+", choices=list(SOURCES), default=None)
    parser.add_argument("--tokens", type=int, help="of each distribution")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=pathlib.Path, help="keeps what is measured, to go on later")
    parser.add_argument("--minutes", type=float, default=math.inf, help="then stop, with status 75")
    parser.add_argument(
        "--out", type=pathlib.Path, help="draw the figures of one, smollm2 rather, here"
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of tables")
    args = parser.parse_args()
    try:
        figures = measure(
            quick=args.quick,
            on=tuple(args.on) if args.on else None,
            tokens=args.tokens,
            seed=args.seed,
            work=args.work,
            minutes=args.minutes,
        )
    except Unfinished as so_far:
        print(f"{so_far}; the same command goes on", file=sys.stderr)
        return os.EX_TEMPFAIL
    if args.json:
        print(json.dumps(figures))
    else:
        show(figures, rich.console.Console(width=120))
    if args.out:
        name = next(name for name in reversed(SOURCES) if name in figures)
        draw(figures[name]["rows"], SUBJECTS[name]).savefig(args.out, dpi=140)
    return 0


if __name__ == "__main__":
    sys.exit(main())
