"""How much is learnt and measured: as it is reported, and just to see that it works."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from distill_jax.models import LlamaConfig

DEMONSTRATIONS, PROMPTS, FRESH, LESSONS = "demonstrations", "prompts", "fresh", "lessons"
"""Questions to learn from, none in two of them: right answers of SFT; what rejection sampling asks,
and on-policy distillation; what the model is asked that DPO starts from; the teacher's answers."""
_NO_CHECKPOINTS = 10_000  # a stage is short enough to be done again


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """How much is learnt and measured.

    Attributes:
      digits: of a number.
      asked: how many questions of each kind there are to learn from.
      measured: questions to measure with.
      settings: fields of the recipe's `posttraining`.
      teacher_steps: of the teacher's fine-tuning.
      shape: of all models.
    """

    digits: int
    asked: Mapping[str, int]
    measured: int
    settings: Mapping[str, Any]
    teacher_steps: int
    shape: LlamaConfig


def _training(stage: str, steps: int, batch_rows: int, **optimizer: float) -> dict[str, Any]:
    """Settings of a stage's training; the rest is the recipe's."""
    own = {"steps": steps, "batch_rows": batch_rows, "checkpoint_every": _NO_CHECKPOINTS}
    own |= {f"optimizer.{name}": value for name, value in optimizer.items()}
    return {f"{stage}.{name}": value for name, value in own.items()}


_FULL = Size(
    digits=6,
    asked={DEMONSTRATIONS: 64, PROMPTS: 800, FRESH: 800, LESSONS: 4000},
    measured=512,
    settings=_training("sft_train", 240, 8)
    | _training("on_policy_train", 100, 32)
    | _training("rejection_train", 80, 8)
    | _training("dpo_train", 60, 32, learning_rate=3e-4)
    | {"rejection.samples": 10, "dpo.beta": 3.0},
    teacher_steps=960,
    shape=LlamaConfig(
        vocab_size=288,
        embed=64,
        mlp=192,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        tied=True,
        context=128,
    ),
)
SIZES = {
    "full": _FULL,
    "quick": dataclasses.replace(
        _FULL,
        digits=2,
        asked={DEMONSTRATIONS: 16, PROMPTS: 16, FRESH: 12, LESSONS: 8},
        measured=8,
        settings=_FULL.settings
        | {"sft_train.steps": 40, "rejection_train.optimizer.learning_rate": 1e-4}
        | {f"{stage}_train.steps": 2 for stage in ("on_policy", "rejection", "dpo")}
        | {f"{stage}_train.batch_rows": 8 for stage in ("on_policy", "dpo")},
        teacher_steps=40,
    ),
}
