"""Forward and reverse KL to a teacher, on given answers and on what the student writes itself."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import runs
import sizes

from distill_jax import losses, models, posttraining
from distill_jax.pipeline import Stage
from distill_jax.stages import context
from distill_jax.stages.context import ON_POLICY, REJECTION, SFT

NAME = "distillation"
TEACHER = context.teacher("large")
GIVEN_FORWARD, OWN_FORWARD = "given-forward-kl", "own-forward-kl"
GIVEN_REVERSE, OWN_REVERSE = "given-reverse-kl", "own-reverse-kl"
GKD, MINILLM = "gkd", "minillm"
_WAYS: Mapping[str, Mapping[str, Any]] = {
    GIVEN_FORWARD: {"divergence": "forward_kl", "student_share": 0.0},
    GIVEN_REVERSE: {"divergence": "reverse_kl", "student_share": 0.0},
    OWN_FORWARD: {"divergence": "forward_kl", "student_share": 1.0},
    OWN_REVERSE: {"divergence": "reverse_kl", "student_share": 1.0},
    GKD: {"divergence": "gkd", "student_share": 0.5},
    MINILLM: {"method": "minillm"},
}
MODELS = (TEACHER, REJECTION, *_WAYS)


def stages(run: context.Run, files: dict[str, str], size: sizes.Size) -> list[Stage]:
    """The teacher, one for each way to learn from it, and the one that measures them.

    All ways start from what rejection sampling leaves, see the same questions, and take as many
    steps; what is given are the right answers.
    """
    post: Any = run.recipe.posttraining
    lessons = {
        "sft.data": files[sizes.LESSONS],
        "sft_train": dataclasses.replace(post.sft_train, steps=size.teacher_steps),
    }
    same = {
        "sft.data": files[sizes.PROMPTS],
        "sft.sequence_length": runs.ROW,
        "on_policy.sequence_length": runs.ROW,
    }
    ways = (
        (name, same | {f"on_policy.{field}": value for field, value in own.items()})
        for name, own in _WAYS.items()
    )
    return [
        runs.stage(run, SFT, TEACHER, context.student(run.recipe.seeds[0]), **lessons),
        *(runs.stage(run, ON_POLICY, name, REJECTION, **changes) for name, changes in ways),
        runs.measuring(NAME, MODELS, size, lambda: _measured(run, size)),
    ]


def _measured(run: context.Run, size: sizes.Size) -> dict[str, Any]:
    problems = runs.measured_problems(run, size)
    found = {}
    for name in MODELS:
        model = run.load(name)
        found[name] = runs.scores(run, model, problems) | _of_right_answers(run, model, problems)
    return found


def _of_right_answers(
    run: context.Run, model: models.Model, problems: Sequence[posttraining.Problem]
) -> dict[str, float]:
    """In nats a token, at the tokens of right answers: the model's entropy, and its loss."""
    config = posttraining.SftConfig(sequence_length=runs.ROW)
    rows = posttraining.sft_rows(run.tokenizer, posttraining.demonstrations(problems), config)
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    logits = jax.jit(models.logits, static_argnums=0)
    logits_BTV = logits(model.config, model.params, batch["tokens"], batch["segment_ids"])
    entropy_BT = jnp.sum(jax.scipy.special.entr(jax.nn.softmax(logits_BTV)), axis=-1)
    loss_BT = -losses.token_log_probs(logits_BTV, batch["labels"])
    return {
        name: float(jnp.mean(values_BT, where=batch["where"]))
        for name, values_BT in (("entropy", entropy_BT), ("cross_entropy", loss_BT))
    }
