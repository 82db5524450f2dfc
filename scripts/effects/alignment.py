"""SFT, rejection sampling, DPO with and without its NLL term: the recipe's stages, measured."""

import dataclasses
from typing import Any

import numpy as np
import questions
import runs
from etils import epath

from distill_jax import pipeline, posttraining
from distill_jax.models import LlamaConfig
from distill_jax.pipeline import Stage
from distill_jax.stages import context

LONGER, NO_NLL = "sft-longer", "dpo-without-nll"
MODELS = (context.SFT, LONGER, context.REJECTION, context.DPO, NO_NLL)
PREFERRED = (context.REJECTION, context.DPO, NO_NLL)
"""The start of both DPOs, and what they leave."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """How much is learnt and measured.

    Attributes:
      digits: of a number.
      demonstrations: right answers that SFT learns.
      prompts: other questions, of which rejection sampling draws answers.
      measured: questions to measure with.
      settings: fields of the recipe's `posttraining`.
      shape: of the model.
    """

    digits: int
    demonstrations: int
    prompts: int
    measured: int
    settings: dict[str, Any]
    shape: LlamaConfig


def measure(size: Size, seed: int, work: epath.Path) -> dict[str, Any]:
    """{model: figures} of one seed."""
    place, asked = work / f"seed-{seed}", size.demonstrations + size.prompts
    drawn = questions.questions("train", asked, size.digits, seed)
    files = [
        questions.write(place / f"{name}.jsonl", some)
        for name, some in (
            ("demonstrations", drawn[: size.demonstrations]),
            ("prompts", drawn[size.demonstrations :]),
        )
    ]
    run = context.Run(runs.recipe(seed, *files, size.settings), place / "run")
    return dict(pipeline.run(_stages(run, size), run.directory)["measured"])


def _stages(run: context.Run, size: Size) -> list[Stage]:
    post: Any = run.recipe.posttraining
    both = post.sft_train.steps + post.rejection_train.steps
    longer = {"sft_train": dataclasses.replace(post.sft_train, steps=both)}
    made = [
        *runs.begun(run, size.shape),
        *(runs.of_recipe(run, one, one) for one in (context.SFT, context.REJECTION, context.DPO)),
        runs.of_recipe(run, context.SFT, LONGER, **longer),
        runs.of_recipe(run, context.DPO, NO_NLL, **{"dpo.nll_weight": 0.0}),
    ]
    measured = Stage(
        name="measured",
        command="measured",
        recipe={"questions": size.measured, "digits": size.digits},
        inputs=(context.CORPUS, *MODELS),
        work=lambda place: _measured(run, size),
    )
    return [*made, measured]


def _measured(run: context.Run, size: Size) -> dict[str, Any]:
    seed = run.recipe.seeds[0]
    problems = questions.questions(runs.measured_on(seed), size.measured, size.digits, 0)
    found: dict[str, Any] = {}
    for name in MODELS:
        model = run.load(name)
        found[name] = runs.scores(run, model, problems)
        if name in PREFERRED:
            found[name] |= _log_probs(run, name)
    return found


def _log_probs(run: context.Run, name: str) -> dict[str, float]:
    """Of the pairs that DPO learns: mean log-probability of an answer, in nats."""
    post: Any = run.recipe.posttraining
    records = posttraining.read_samples(run.directory / context.REJECTION / "samples")
    pairs = posttraining.sampled_pairs(run.tokenizer, records, post.rejection.template)
    rows = posttraining.pair_rows(pairs, post.dpo, pad_id=run.tokenizer.pad_id)
    rows = posttraining.with_reference(run.load(name), rows, post.dpo, pairs_per_batch=64)
    chosen, rejected = np.mean([row["reference_log_probs"] for row in rows], axis=0)
    return {"pairs": len(rows), "chosen": float(chosen), "rejected": float(rejected)}
