"""On-policy distillation: a teacher corrects what the student itself writes.

GKD (Agarwal et al. 2024) compares the distributions of both at every token of the student's
answers, or of given ones; MiniLLM (Gu et al. 2024) minimises the reverse KL of whole answers by a
policy gradient. `rollouts` makes their batches, `losses.policy` has their formulas.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from distill_jax import losses
from distill_jax.artifacts import InputError, check_choices
from distill_jax.models import LlamaConfig
from distill_jax.models.llama import Remat
from distill_jax.posttraining.prompts import PromptConfig
from distill_jax.training import LossFn, language_model_loss

Method = Literal["gkd", "minillm"]

TEACHER = "teacher"
"""What the loss calls the teacher."""
CONVERSATIONS, TEXT = "conversations", "text"
"""What cross-entropy may be learnt on beside: names in a batch, and terms of the loss."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnPolicyConfig(PromptConfig):
    """What the student is asked, see `PromptConfig`, and what it learns from its own answers.

    Attributes:
      teacher: a teacher of the recipe, which reads the answers.
      method: "gkd" or "minillm".
      sequence_length: tokens of a row; a row holds one question with its answer, and the rest of it
        is padding that costs as much.
      rollout_rows: answers that are drawn with the same parameters, a round of training; a multiple
        of a batch's rows, None for those of one batch (MiniLLM's own: 256).
      epochs: how often each of them is learnt before the next round (MiniLLM's own: 4).
      rows_at_once: most answers that are written, or read for MiniLLM's rewards, at the same time,
        which bounds the memory of the cache. Whoever writes, the teacher too if it takes part, has
        its weights laid out once more meanwhile.
      conversations_weight: weight of the mean cross-entropy on as many conversations of fine-tuning
        as a batch has rows; it and the next cost a pass of their own over the parameters.
      text_weight: weight of the mean cross-entropy on as many rows of the corpus's text, MiniLLM's
        pre-training term (its own: 1).
      student_share: of GKD, lambda: the part of the rounds, drawn by chance, that are answers of
        the student's own; the others are conversations of fine-tuning. As in the paper all rows of
        a round are of one kind, so that each kind is averaged over its own tokens and long answers
        do not weigh more. Prompts and conversations are counted over all rounds: a lap through
        either leaves out what falls on rounds of the other kind.
      divergence: of GKD, name of a divergence in `distill_jax.losses`.
      options: of GKD, further keyword arguments of the divergence, such as {"beta": 0.9}.
      divergence_temperature: of GKD, softens both sides of the divergence.
      teacher_share: of MiniLLM, the teacher's part in the mixture that answers are drawn from, in
        [0, 1).
      clip: of MiniLLM, see `losses.clipped_surrogate`.
      reward_clip: of MiniLLM, this and the next two as in `losses.minillm_advantages`.
      length_normalised: see there.
      whitening: see there.
      whole_weights: of MiniLLM, whether a token has the importance weight of its whole answer,
        which is exact and of large variance, and not its own; see `losses.importance_weights`.
    """

    teacher: str | None = None
    method: Method = "gkd"
    sequence_length: int = 512
    rollout_rows: int | None = None
    epochs: int = 1
    rows_at_once: int = 32
    conversations_weight: float = 0.0
    text_weight: float = 0.0
    student_share: float = 0.5
    divergence: str = "gkd"
    options: Mapping[str, float] = dataclasses.field(default_factory=dict)
    divergence_temperature: float = 1.0
    teacher_share: float = 0.2
    clip: float = 0.2
    reward_clip: float = 100.0
    length_normalised: bool = True
    whitening: bool = True
    whole_weights: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, {"method": Method})
        if self.divergence not in losses.DIVERGENCES:
            raise InputError(
                f"OnPolicyConfig.divergence: {self.divergence!r} is none of the divergences "
                f"{', '.join(losses.DIVERGENCES)}"
            )
        if self.sequence_length < self.max_new_tokens + 1:
            self._refuse("sequence_length", f"answers alone may have {self.max_new_tokens} tokens")
        for name in ("epochs", "rows_at_once", "rollout_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                self._refuse(name, "at least 1")
        for name in ("conversations_weight", "text_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                self._refuse(name, "it must be a number and not negative")
        for name in ("divergence_temperature", "clip", "reward_clip"):
            if not getattr(self, name) > 0:
                self._refuse(name, "it must be above 0")
        if not 0 <= self.student_share <= 1:
            self._refuse("student_share", "it must be in [0, 1]")
        if not 0 <= self.teacher_share < 1:
            self._refuse("teacher_share", "it must be in [0, 1)")
        if self.method == "minillm":
            if self.temperature != 1:
                self._refuse("temperature", "MiniLLM's gradient is that of sampling at 1")
            if self.top_p is not None:
                self._refuse("top_p", "MiniLLM's gradient is that of sampling from all tokens")

    def _refuse(self, name: str, why: str) -> None:
        raise InputError(f"OnPolicyConfig.{name} is {getattr(self, name)}; {why}")

    @property
    def mixed(self) -> bool:
        """Whether the teacher takes part in the writing."""
        return self.method == "minillm" and self.teacher_share > 0

    @property
    def given_share(self) -> float:
        """The part of the rounds that are given conversations."""
        return 1 - self.student_share if self.method == "gkd" else 0.0

    @property
    def beside(self) -> dict[str, float]:
        """What cross-entropy is learnt on beside, and its weight."""
        weights = {CONVERSATIONS: self.conversations_weight, TEXT: self.text_weight}
        return {name: weight for name, weight in weights.items() if weight}

    @property
    def uses_conversations(self) -> bool:
        """Whether those of fine-tuning are learnt, too."""
        return self.given_share > 0 or CONVERSATIONS in self.beside


def on_policy_objective(config: OnPolicyConfig) -> losses.Objective:
    """What is minimised of a round's tokens, and what is watched beside.

    Its terms are the loss by the divergence's name, or "minillm" with the terms of
    `losses.minillm`, of which "single_step" is KL(student || teacher); of GKD that KL is
    "reverse_kl", unless it is what is minimised; "entropy", the student's; and "teacher_log_prob",
    the teacher's of the token that was written.
    """
    if config.method == "minillm":
        learnt = {"minillm": (1.0, losses.minillm(TEACHER, clip=config.clip))}
    else:
        divergence = losses.distill(
            TEACHER,
            losses.DIVERGENCES[config.divergence],
            temperature=config.divergence_temperature,
            **config.options,
        )
        watched = (0.0, losses.distill(TEACHER, losses.reverse_kl))
        learnt = {"reverse_kl": watched} | {config.divergence: (1.0, divergence)}
    return losses.weighted_sum(
        **learnt, entropy=(0.0, _entropy), teacher_log_prob=(0.0, _teacher_log_prob)
    )


def on_policy_loss(
    model: LlamaConfig,
    teacher: LlamaConfig,
    config: OnPolicyConfig,
    *,
    remat: Remat = "none",
    compute_dtype: str = "float32",
    mesh: Mesh | None = None,
) -> LossFn:
    """The loss of `training.train` over batches of `Rollouts`, with {TEACHER: model} as teachers.

    The mean of `on_policy_objective` over the round's tokens, plus each weight in `config.beside`
    times the mean cross-entropy of what it is of, a term by its name. `remat`, `compute_dtype` and
    `mesh` are those of `training.language_model_loss`.

    Raises:
      InputError: the teacher's vocabulary is another one.
    """
    of_round = language_model_loss(
        model,
        on_policy_objective(config),
        remat=remat,
        compute_dtype=compute_dtype,
        teacher_targets=dict if config.method == "minillm" else None,
        live={TEACHER: teacher},
        mesh=mesh,
    )
    of_others = language_model_loss(
        model, losses.hard_labels(), remat=remat, compute_dtype=compute_dtype, mesh=mesh
    )

    def loss_fn(params: Any, batch: Mapping[str, Any], step: Array, *frozen: Any) -> losses.Totals:
        totals = of_round(params, batch, step, *frozen)
        loss, terms = totals.loss, dict(totals.terms)
        for name, weight in config.beside.items():
            # The sum of these tokens is already per token of theirs, and times the round's.
            other = of_others(params, batch[name], step)
            loss, terms[name] = loss + weight * other.loss, other.loss
        return losses.Totals(loss, totals.weight, terms)

    return loss_fn


def _entropy(
    logits_NV: Array, targets: Mapping[str, Any], *, step: Array | None = None
) -> tuple[Array, dict[str, Array]]:
    """-sum q log q of the student, in nats."""
    del targets, step
    return jnp.sum(jax.scipy.special.entr(jax.nn.softmax(logits_NV)), axis=-1), {}


def _teacher_log_prob(
    logits_NV: Array, targets: Mapping[str, Any], *, step: Array | None = None
) -> tuple[Array, dict[str, Array]]:
    """log p(label) of the teacher."""
    del logits_NV, step
    return losses.token_log_probs(targets[TEACHER], targets["labels"]), {}
