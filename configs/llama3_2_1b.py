"""Llama 3.1 8B -> Llama 3.2 1B, taught by 8B and 70B, as Meta describes it.

Point LLAMA_3_1_8B and LLAMA_3_1_70B at Hugging Face folders (gs:// works where gcsfs is installed)
and CORPUS at JSON lines with a field "text". Meta trained on up to 9T tokens; the steps here are a
first 100B. Teachers are held, and written once more to the run's directory, in float32: 282 GB for
70B. `evaluate` holds all models at once.

`--set live=8b` distills from 8B alone, which then runs beside the student, in bfloat16, instead of
having its distributions stored; `--set live=both` runs both so. With `--set on_policy=gkd`, or
minillm, 8B corrects what the fine-tuned student writes. `--set posttraining_rounds=6` goes as many
rounds as Llama 3 did, each on samples of what the one before left; each adds three models to what
`evaluate` holds.
"""

import dataclasses
import os
from typing import Literal

from distill_jax.artifacts import InputError
from distill_jax.data import CorpusConfig
from distill_jax.evaluation import EvaluationConfig
from distill_jax.models import presets
from distill_jax.parallel import MeshConfig
from distill_jax.posttraining import LLAMA3, DpoConfig, OnPolicyConfig, RejectionConfig, SftConfig
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
from distill_jax.teachers import Threshold, WriteConfig
from distill_jax.training import OptimizerConfig, TrainConfig

LLAMA_3_1_8B = os.environ.get("LLAMA_3_1_8B", "Llama-3.1-8B")
LLAMA_3_1_70B = os.environ.get("LLAMA_3_1_70B", "Llama-3.1-70B")
CORPUS = os.environ.get("CORPUS", "corpus.jsonl")
ROWS = 256  # at a time, outside of distillation: one for each chip of a v5e:16x16


def get_config(
    tokens: Literal["1B", "100B"] = "100B",
    live: Literal["none", "8b", "both"] = "none",
    posttraining_rounds: int = 1,
    on_policy: Literal["none", "gkd", "minillm"] = "none",
) -> Recipe:
    if posttraining_rounds < 1:
        raise InputError(f"posttraining_rounds is {posttraining_rounds}; there is at least one")
    sources = {"8b": LLAMA_3_1_8B} | ({} if live == "8b" else {"70b": LLAMA_3_1_70B})
    batch_rows, sequence_length = 512, 4096
    steps = {"1B": 10**9, "100B": 10**11}[tokens] // (batch_rows * sequence_length)
    posttraining = PostTrainingConfig(
        task="capitals",
        sft=SftConfig(sequence_length=4096, template=LLAMA3),
        sft_train=_train(200, 1e-5, batch_rows=ROWS),
        on_policy=OnPolicyConfig(
            teacher="8b",
            method="minillm" if on_policy == "minillm" else "gkd",
            student_share=1.0,
            sequence_length=1024,
            max_new_tokens=512,
            rows_at_once=256,
            template=LLAMA3,
        ),
        on_policy_train=None if on_policy == "none" else _train(200, 1e-5, batch_rows=ROWS),
        rejection=RejectionConfig(
            samples=30, problems_per_batch=64, rows_at_once=512, template=LLAMA3
        ),
        rejection_train=_train(200, 1e-5, batch_rows=ROWS),
        dpo=DpoConfig(),
        dpo_train=_train(100, 1e-5, batch_rows=ROWS),
    )
    *before, last = (
        dataclasses.replace(
            posttraining, rejection=dataclasses.replace(posttraining.rejection, seed=number)
        )
        for number in range(posttraining_rounds)
    )
    return Recipe(
        name=f"llama3_2_1b-{tokens}",
        tokenizer=TokenizerConfig(source=LLAMA_3_1_8B),
        corpus=CorpusConfig(
            source=CORPUS,
            field="text",
            out_of_domain=None,
            sequence_length=sequence_length,
            train_rows=steps * batch_rows,
            held_out_fraction=0.001,
            held_out_rows=1024,
        ),
        teachers={name: TeacherConfig(source=source) for name, source in sources.items()},
        targets=TargetsConfig(
            schemes={"samples": Threshold(tau=0.04)},
            write=WriteConfig(batch_rows=ROWS, rows_per_shard=4096),
        ),
        pruned_teacher="8b",
        prune=PruneConfig(target=presets.LLAMA_3_2_1B, sequence_rows=256),
        distill=DistillConfig(
            terms={name: Term(weight=0.9 / len(sources), live=live != "none") for name in sources},
            hard_weight=0.1,
            train=_train(steps, 2e-4, batch_rows=batch_rows),
        ),
        posttraining_rounds=tuple(before),
        posttraining=last,
        evaluation=EvaluationConfig(batch_rows=ROWS, chunk_tokens=8192),
        prompts=("The capital of France is",),
        mesh=MeshConfig(fsdp=-1),
    )


def _train(steps: int, learning_rate: float, *, batch_rows: int) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        batch_rows=batch_rows,
        optimizer=OptimizerConfig(learning_rate=learning_rate, warmup_fraction=0.02),
        remat="full",
        compute_dtype="bfloat16",
        checkpoint_every=500,
        log_every=10,
    )
