"""Two small teachers trained from scratch, and every stage after them, in a few minutes.

`--set size=test` is a cut of it that the tests run; `--set divergence=reverse_kl`, or any other
divergence of `distill_jax.losses`, is what the student minimises. With `--set on_policy=gkd`, or
minillm, the large teacher corrects what the fine-tuned student writes; with
`--set posttraining_rounds=2`, post-training goes two rounds, the second on samples of what the
first left.
"""

import dataclasses
from typing import Literal

from distill_jax.artifacts import InputError
from distill_jax.data import CorpusConfig
from distill_jax.evaluation import EvaluationConfig, SpeedConfig
from distill_jax.models import LlamaConfig
from distill_jax.posttraining import DpoConfig, OnPolicyConfig, RejectionConfig, SftConfig
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
from distill_jax.teachers import Threshold, TopK, WriteConfig
from distill_jax.training import OptimizerConfig, TrainConfig


def get_config(
    size: Literal["default", "test"] = "default",
    divergence: str = "forward_kl",
    on_policy: Literal["none", "gkd", "minillm"] = "none",
    posttraining_rounds: int = 1,
) -> Recipe:
    if posttraining_rounds < 1:
        raise InputError(f"posttraining_rounds is {posttraining_rounds}; there is at least one")
    test = size == "test"
    vocab_size = 512 if test else 4096
    steps = 8 if test else 40
    posttraining = PostTrainingConfig(
        task="continents",
        problems=24 if test else 60,
        sft=SftConfig(sequence_length=128),
        sft_train=_train(120 if test else 80),
        replay=0.25,
        on_policy=OnPolicyConfig(
            teacher="large",
            method="minillm" if on_policy == "minillm" else "gkd",
            sequence_length=128,
            max_new_tokens=12,
            text_weight=1.0 if on_policy == "minillm" else 0.0,
        ),
        on_policy_train=None if on_policy == "none" else _train(steps // 2, 1e-3),
        rejection=RejectionConfig(samples=6, max_new_tokens=12),
        rejection_train=_train(steps // 2),
        dpo=DpoConfig(sequence_length=128),
        dpo_train=_train(steps // 2, learning_rate=1e-4),
    )
    *before, last = (_round(posttraining, number, steps) for number in range(posttraining_rounds))
    return Recipe(
        name="tiny-test" if test else "tiny",
        tokenizer=TokenizerConfig(vocab_size=vocab_size),
        corpus=CorpusConfig(
            sequence_length=128,
            train_rows=48 if test else 320,
            held_out_rows=16 if test else 32,
            out_of_domain_rows=8 if test else 16,
        ),
        teachers={
            "large": TeacherConfig(shape=_shape(vocab_size, 4, 128), train=_train(steps)),
            "small": TeacherConfig(shape=_shape(vocab_size, 2, 64), train=_train(steps)),
        },
        targets=TargetsConfig(
            schemes={"top_k": TopK(k=16), "samples": Threshold(tau=0.04)},
            write=WriteConfig(rows_per_shard=16 if test else 512),
        ),
        pruned_teacher="large",
        prune=PruneConfig(
            calibration_rows=32,
            target=LlamaConfig(
                vocab_size=vocab_size,
                embed=96,
                mlp=256,
                layers=3,
                heads=4,
                kv_heads=2,
                head_dim=16,
                tied=True,
                context=512,
            ),
        ),
        distill=DistillConfig(
            terms={
                "large": Term(weight=0.7, divergence=divergence),
                "small": Term(weight=0.2, divergence=divergence),
            },
            hard_weight=0.1,
            train=_train(steps),
        ),
        controls=("cross_entropy", "random_start"),
        seeds=(0,),
        posttraining_rounds=tuple(before),
        posttraining=last,
        evaluation=EvaluationConfig(speed=SpeedConfig(new_tokens=16, prefill_tokens=64)),
        prompts=("The capital of France is", "The first season of the series"),
        notes=("These models are far too small to know anything: they only show the way.",),
    )


def _round(first: PostTrainingConfig, number: int, steps: int) -> PostTrainingConfig:
    """A later round draws other samples, and starts from an answering model: it needs less."""
    if number == 0:
        return first
    samples = dataclasses.replace(first.rejection, seed=number)
    return dataclasses.replace(first, sft_train=_train(steps), rejection=samples)


def _shape(vocab_size: int, layers: int, embed: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        embed=embed,
        mlp=3 * embed,
        layers=layers,
        heads=embed // 16,
        kv_heads=embed // 32,
        head_dim=16,
        tied=True,
        context=512,
    )


def _train(steps: int, learning_rate: float = 3e-3) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        batch_rows=8,
        optimizer=OptimizerConfig(learning_rate=learning_rate),
        checkpoint_every=max(steps // 3, 1),
    )
