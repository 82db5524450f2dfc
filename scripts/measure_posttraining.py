"""Does post-training do what its papers say?

    python scripts/measure_posttraining.py --out posttraining.png       # three seeds
    python scripts/measure_posttraining.py --seeds 0 --work DIR
    python scripts/measure_posttraining.py --quick --json               # only that it works

The stages are those of configs/tiny.py, in its optimizer's settings but for the steps, the learning
rates and the batches below. The task is to sort six digits ("Sort 325288"), and a program checks
the answer. A model starts from random parameters and sees nothing but these questions. Questions
are split by a hash into those to learn from, to tune on and to measure on; a seed draws the first
parameters, the questions, their order, and all samples.

There are few right answers (64) for SFT; then rejection sampling asks other questions (800), 10
times each, and fine-tunes on the best answer to each that has a right one; then DPO on pairs of a
right answer and a wrong one, with the recipe's NLL term (0.2) and without it. "sft-longer" is SFT
for as many steps as SFT and rejection sampling have together. Right answers are counted over
held-out questions, greedily and sampled at temperature 1; log-probabilities are those of whole
answers, over the pairs that DPO learns, before and after it.

The settings were chosen with seed 1000 on questions for tuning (any seed from 1000 on measures on
these). Shown are means ± standard errors over seeds; differences are paired by seed, and told from
noise if their 95% interval (Student's t) leaves out 0.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "effects"))

import alignment
import drawing
import rich.console
import rich.table
from etils import epath
from paired import Difference, difference, mean
from sizes import SIZES

from distill_jax import parallel
from distill_jax.stages import context


class Claim(NamedTuple):
    """What papers say of a figure of one model beside another's: "above", "below", "not below"."""

    figure: str
    ours: str
    theirs: str
    said: str


CLAIMS = [
    *(
        Claim(figure, ours, theirs, "above")
        for figure in ("greedy", "sampled")
        for ours, theirs in (
            (context.REJECTION, context.SFT),
            (context.REJECTION, alignment.LONGER),
            (context.DPO, context.REJECTION),
            (context.DPO, alignment.NO_NLL),
        )
    ),
    Claim("chosen", alignment.NO_NLL, context.REJECTION, "below"),
    Claim("chosen", context.DPO, context.REJECTION, "not below"),
    Claim("rejected", context.DPO, context.REJECTION, "below"),
]
COLUMNS = ("greedy", "sampled", "chosen", "rejected")


def measure(seeds: Sequence[int], size: str, work: epath.Path) -> dict[str, dict[str, list[float]]]:
    """{model: {figure: its values by seed}}; what stands in `work` is kept."""
    by_seed = [alignment.measure(SIZES[size], seed, work) for seed in seeds]
    return {
        model: {name: [one[model][name] for one in by_seed] for name in by_seed[0][model]}
        for model in alignment.MODELS
    }


def compare(found: Mapping[str, Mapping[str, Sequence[float]]]) -> list[tuple[Claim, Difference]]:
    """What the papers claim, beside what was found."""
    made = []
    for claim in CLAIMS:
        ours, theirs = ((one, found[one][claim.figure]) for one in (claim.ours, claim.theirs))
        made.append((claim, difference(ours, theirs, claim.figure)))
    return made


def verdict(claim: Claim, found: Difference) -> str:
    """Whether a difference bears a claim out."""
    if found.outcome not in ("above", "below"):
        return found.outcome
    held = found.outcome in (claim.said, {"not below": "above"}.get(claim.said))
    return "as published" if held else "not as published"


def show(found: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    console = rich.console.Console(stderr=True, width=140)
    models = _table("", "", *COLUMNS)
    for model, figures in found.items():
        cells = (mean(figures[name], 3) if name in figures else "" for name in COLUMNS)
        models.add_row(model, *cells)
    console.print(models)
    claims = _table("differences, with 95% intervals", *("figure", "of", "published", "found", ""))
    for claim, one in compare(found):
        of = f"{claim.ours} - {claim.theirs}"
        claims.add_row(claim.figure, of, claim.said, one.text(3), verdict(claim, one))
    console.print(claims)


def _table(title: str, *columns: str) -> rich.table.Table:
    made = rich.table.Table(title=title, title_justify="left")
    for column in columns:
        made.add_column(column.replace("_", " "), justify="right" if made.columns else "left")
    return made


def main() -> None:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--quick", action="store_true", help="a few steps, one seed")
    parser.add_argument("--work", help="where results are kept; a temporary place if --quick")
    parser.add_argument("--out", help="where the picture goes")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    size = "quick" if options.quick else "full"
    seeds = options.seeds or ([0] if options.quick else [0, 1, 2])
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or (scratch if options.quick else "runs/measure_posttraining")
        parallel.keep_compiled()  # seeds run the same programs
        found = measure(seeds, size, epath.Path(work))
    show(found)
    if options.out:
        drawing.draw(found).savefig(options.out, dpi=110)
    if options.json:
        told = [
            {**claim._asdict(), "difference": one.paired.mean, "half": one.half}
            | {"verdict": verdict(claim, one)}
            for claim, one in compare(found)
        ]
        print(json.dumps({"figures": found, "claims": told}))


if __name__ == "__main__":
    main()
