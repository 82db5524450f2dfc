"""Does post-training do what its papers say?

    python scripts/measure_posttraining.py --out posttraining.png       # three seeds
    python scripts/measure_posttraining.py --seeds 0 --work DIR
    python scripts/measure_posttraining.py --quick --json               # only that it works

The stages are those of configs/tiny.py, in its optimizer's settings but for the steps, the learning
rates and the batches below. The task is to sort six digits ("Sort 325288"), and a program checks
the answer. A model starts from random parameters and sees nothing but these questions. Questions
are split by a hash into those to learn from, to tune on and to measure on; a seed draws the first
parameters, the questions to learn from, their order, and all samples.

"alignment": there are few right answers (64) for SFT; then rejection sampling asks other questions
(800), 10 times each, and fine-tunes on the best answer to each that has a right one. What that
leaves is asked new questions (800), and DPO starts from it, on pairs of a right and a wrong answer
of its own, as Llama 3 takes pairs of its newest model ("fresh/dpo"). Beside it stand rejection
sampling once more, on the best of the same answers ("fresh/rejection-sample"); DPO on the pairs of
the first rejection sampling, whose right answers were just learnt ("dpo-old-pairs"); and DPO that
hardly holds to its start (beta 0.5 in place of 3), with the recipe's NLL term (0.2) and without it.
"sft-longer" is SFT for as many steps as SFT and rejection sampling have together.

"distillation": what the first rejection sampling leaves learns from a teacher of its own shape,
which SFT made of 4000 right answers; each way takes 100 steps of 32 answers to the questions of
rejection sampling. Forward or reverse KL, on given right answers or on the student's own; GKD, with
half of the rounds on its own; and MiniLLM.

Right answers are counted over held-out questions, greedily and sampled at temperature 1; chosen and
rejected are log-probabilities of whole answers, over the fresh pairs; entropy and cross-entropy are
those of the next token, at the tokens of right answers to held-out questions. These are the same
for all seeds.

The settings were chosen with seeds 1000 and 1001 (of distillation, 1000 alone) on questions for
tuning (any seed from 1000 on measures on these). Shown are means ± standard errors over seeds;
differences are paired by seed, and told from noise if their 95% interval (Student's t) leaves out
0.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "effects"))

import alignment
import distillation
import drawing
import rich.console
import rich.table
import runs
from alignment import AGAIN, FRESH, LONGER, LOOSE, NO_NLL, STALE
from distillation import GIVEN_FORWARD, GIVEN_REVERSE, GKD, MINILLM, OWN_FORWARD, OWN_REVERSE
from etils import epath
from paired import Difference, difference, mean
from sizes import SIZES, Size

from distill_jax import parallel, pipeline
from distill_jax.stages.context import REJECTION, SFT

Found = dict[str, dict[str, dict[str, list[float]]]]
"""{part: {model: {figure: its values by seed}}}"""


class Claim(NamedTuple):
    """What papers say of a figure of one model beside another's: "above", "below", "not below"."""

    figure: str
    ours: str
    theirs: str
    said: str


COLUMNS = {
    alignment.NAME: ("greedy", "sampled", "chosen", "rejected"),
    distillation.NAME: ("greedy", "sampled", "entropy", "cross_entropy"),
}
CLAIMS = {
    alignment.NAME: [
        *(
            Claim(figure, ours, theirs, "above")
            for figure in ("greedy", "sampled")
            for ours, theirs in (
                (REJECTION, SFT),
                (REJECTION, LONGER),
                (FRESH, REJECTION),
                (FRESH, STALE),
                (FRESH, AGAIN),
                (LOOSE, NO_NLL),
            )
        ),
        Claim("chosen", NO_NLL, REJECTION, "below"),
        Claim("chosen", LOOSE, REJECTION, "not below"),
        Claim("rejected", FRESH, REJECTION, "below"),
    ],
    distillation.NAME: [
        Claim(figure, ours, theirs, said)
        for figure, said in (
            ("greedy", "above"),
            ("sampled", "above"),
            ("entropy", "below"),
            ("cross_entropy", "above"),
        )
        for ours, theirs in (
            (GIVEN_REVERSE, GIVEN_FORWARD),
            (OWN_REVERSE, OWN_FORWARD),
            (OWN_REVERSE, GIVEN_FORWARD),
            (GKD, GIVEN_FORWARD),
            (MINILLM, GIVEN_FORWARD),
        )
    ],
}


def measure(seeds: Sequence[int], size: str, work: epath.Path) -> Found:
    """What all seeds found; what stands in `work` is kept."""
    by_seed = [measure_seed(SIZES[size], seed, work / f"seed-{seed}") for seed in seeds]
    return {
        part: {
            model: {name: [one[part][model][name] for one in by_seed] for name in figures}
            for model, figures in models.items()
        }
        for part, models in by_seed[0].items()
    }


def measure_seed(size: Size, seed: int, place: epath.Path) -> dict[str, Any]:
    """{part: {model: figures}} of one seed."""
    run, files = runs.begin(size, seed, place)
    parts = (alignment, distillation)
    made = [stage for part in parts for stage in part.stages(run, files, size)]
    figures = pipeline.run([*runs.begun(run, size.shape), *made], run.directory)
    return {part.NAME: {one: figures[part.NAME][one] for one in part.MODELS} for part in parts}


def compare(found: Found) -> list[tuple[str, Claim, Difference]]:
    """What the papers claim of each part, beside what was found."""
    made = []
    for part, claims in CLAIMS.items():
        for claim in claims:
            ours, theirs = (
                (one, found[part][one][claim.figure]) for one in (claim.ours, claim.theirs)
            )
            made.append((part, claim, difference(ours, theirs, claim.figure)))
    return made


def verdict(claim: Claim, found: Difference) -> str:
    """Whether a difference bears a claim out."""
    if found.outcome not in ("above", "below"):
        return found.outcome
    held = found.outcome in (claim.said, {"not below": "above"}.get(claim.said))
    return "as published" if held else "not as published"


def show(found: Found) -> None:
    console = rich.console.Console(stderr=True, width=140)
    for part, models in found.items():
        table = _table(part, "", *COLUMNS[part])
        for model, figures in models.items():
            cells = (mean(figures[name], 3) if name in figures else "" for name in COLUMNS[part])
            table.add_row(model, *cells)
        console.print(table)
    claims = _table("differences, with 95% intervals", *("figure", "of", "published", "found", ""))
    for _, claim, one in compare(found):
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
            {"part": part, **claim._asdict(), "difference": one.paired.mean, "half": one.half}
            | {"verdict": verdict(claim, one)}
            for part, claim, one in compare(found)
        ]
        print(json.dumps({"figures": found, "claims": told}))


if __name__ == "__main__":
    main()
