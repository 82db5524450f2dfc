"""SFT, rejection sampling, and DPO on old and on fresh pairs: the recipe's stages, measured."""

import dataclasses
from typing import Any

import numpy as np
import runs
import sizes

from distill_jax import posttraining
from distill_jax.pipeline import Stage
from distill_jax.stages import context
from distill_jax.stages.context import DPO, REJECTION, SFT

NAME = "alignment"
LONGER, STALE = "sft-longer", "dpo-old-pairs"
AGAIN, FRESH = f"fresh/{REJECTION}", f"fresh/{DPO}"
LOOSE, NO_NLL = f"fresh/{DPO}-loose", f"fresh/{DPO}-loose-without-nll"
"""Ways to learn from what the model of REJECTION answers to other questions."""
MODELS = (SFT, LONGER, REJECTION, STALE, AGAIN, FRESH, LOOSE, NO_NLL)
PAIRED = (REJECTION, AGAIN, FRESH, LOOSE, NO_NLL)
"""The start of DPO on fresh pairs, and what learns from these."""
_LOOSE_BETA = 0.5


def stages(run: context.Run, files: dict[str, str], size: sizes.Size) -> list[Stage]:
    """One for each of the models, and the one that measures them."""
    post: Any = run.recipe.posttraining
    start = context.student(run.recipe.seeds[0])
    both = post.sft_train.steps + post.rejection_train.steps
    longer = {"sft_train": dataclasses.replace(post.sft_train, steps=both)}
    fresh: dict[str, Any] = {"start": REJECTION, "reads": [AGAIN]}
    loose = {"dpo.beta": _LOOSE_BETA}
    return [
        runs.stage(run, SFT, SFT, start),
        runs.stage(run, SFT, LONGER, start, **longer),
        runs.stage(run, REJECTION, REJECTION, SFT),
        runs.stage(run, DPO, STALE, REJECTION),
        runs.stage(run, REJECTION, AGAIN, REJECTION, **{"rejection.prompts": files[sizes.FRESH]}),
        runs.stage(run, DPO, FRESH, **fresh),
        runs.stage(run, DPO, LOOSE, **fresh, **loose),
        runs.stage(run, DPO, NO_NLL, **fresh, **loose, **{"dpo.nll_weight": 0.0}),
        runs.measuring(NAME, MODELS, size, lambda: _measured(run, size)),
    ]


def _measured(run: context.Run, size: sizes.Size) -> dict[str, Any]:
    problems = runs.measured_problems(run, size)
    found: dict[str, Any] = {}
    for name in MODELS:
        found[name] = runs.scores(run, run.load(name), problems)
        if name in PAIRED:
            found[name] |= _log_probs(run, name)
    return found


def _log_probs(run: context.Run, name: str) -> dict[str, float]:
    """Of the fresh pairs: mean log-probability of an answer, in nats."""
    post: Any = run.recipe.posttraining
    records = posttraining.read_samples(run.directory / AGAIN / "samples")
    pairs = posttraining.sampled_pairs(run.tokenizer, records, post.rejection.template)
    rows = posttraining.pair_rows(pairs, post.dpo, pad_id=run.tokenizer.pad_id)
    rows = posttraining.with_reference(run.load(name), rows, post.dpo, pairs_per_batch=64)
    chosen, rejected = np.mean([row["reference_log_probs"] for row in rows], axis=0)
    return {"pairs": len(rows), "chosen": float(chosen), "rejected": float(rejected)}
