"""How much is learnt and measured: as it is reported, and just to see that it works."""

import dataclasses
from typing import Any

import alignment

from distill_jax.models import LlamaConfig

_NO_CHECKPOINTS = 10_000  # a stage is short enough to be done again


def _shape(layers: int, embed: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=288,
        embed=embed,
        mlp=3 * embed,
        layers=layers,
        heads=4,
        kv_heads=2,
        head_dim=16,
        tied=True,
        context=128,
    )


def _training(stage: str, steps: int, batch_rows: int, **optimizer: float) -> dict[str, Any]:
    """Settings of a stage's training; the rest is the recipe's."""
    own = {"steps": steps, "batch_rows": batch_rows, "checkpoint_every": _NO_CHECKPOINTS}
    own |= {f"optimizer.{name}": value for name, value in optimizer.items()}
    return {f"{stage}.{name}": value for name, value in own.items()}


_FULL = alignment.Size(
    digits=6,
    demonstrations=64,
    prompts=800,
    measured=512,
    settings=_training("sft_train", 240, 8)
    | _training("rejection_train", 80, 8)
    | _training("dpo_train", 60, 32, learning_rate=3e-5)
    | {"rejection.samples": 10},
    shape=_shape(2, 64),
)
SIZES = {
    "full": _FULL,
    "quick": dataclasses.replace(
        _FULL,
        digits=2,
        demonstrations=16,
        prompts=16,
        measured=8,
        settings=_FULL.settings
        | {"sft_train.steps": 40, "rejection_train.steps": 2, "dpo_train.steps": 2},
    ),
}
