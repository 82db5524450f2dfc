"""Small models of a few token ids, prompts, and everything that may be learnt beside."""

import types

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import models, parallel
from distill_jax.posttraining import Example, OnPolicyConfig, Rollouts, on_policy_loss
from distill_jax.training import OptimizerConfig, TrainConfig, train

END = 2
TOKENIZER = types.SimpleNamespace(pad_id=0, decode=lambda ids: " ".join(map(str, ids)))
ONE = parallel.make_mesh(parallel.MeshConfig(fsdp=1), jax.devices()[:1])
LARGE = 19
PROMPTS = [[3, 1, 4], [15], [9, 2, 6, 5, 3], [5, 8], [9, 7, 9]]
GIVEN = [Example([3, 1, 7, 2], [False, False, True, True]), Example([4, 4, 2], [False, True, True])]


def model_of(seed, vocab_size, layers=1):
    config = models.LlamaConfig(
        vocab_size=vocab_size, embed=8, mlp=8, layers=layers, heads=2, kv_heads=2, head_dim=4,
        tied=False, context=64,
    )  # fmt: skip
    source = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(source.normal(scale=0.6, size=leaf.shape), jnp.float32),
        models.abstract_params(config),
    )
    return models.Model(config, params)


def text(count=6, time=8):
    source = np.random.default_rng(3)
    segments = np.repeat([1, 2, 0], [3, 3, time - 6]).astype(np.int32)
    return [
        {"tokens": source.integers(0, LARGE, time).astype(np.int32), "segment_ids": segments}
        for _ in range(count)
    ]


def setting(**options):
    settings = {"sequence_length": 14, "max_new_tokens": 8, "student_share": 1.0} | options
    return OnPolicyConfig(**settings)


def steps(count, **options):
    optimizer = OptimizerConfig(learning_rate=0.03, schedule="constant", warmup_fraction=0.0)
    return TrainConfig(steps=count, batch_rows=8, optimizer=optimizer, **options)


class Parts:
    """A student, a teacher, and how they are trained."""

    def __init__(self, config, train, *, mesh=ONE, directory=None, kind=Rollouts):
        self.student, self.teacher = model_of(0, LARGE, 2), model_of(1, LARGE)
        self.config, self.steps, self.mesh = config, train, mesh
        self.rollouts = kind(
            self.student.config, self.teacher, TOKENIZER, config, train, PROMPTS,
            conversations=GIVEN, text=text(), mesh=mesh, directory=directory,
        )  # fmt: skip
        self.loss_fn = on_policy_loss(
            self.student.config, self.teacher.config, config,
            mesh=mesh, compute_dtype=train.compute_dtype,
        )  # fmt: skip

    def train(self, directory):
        return train(
            self.student,
            self.loss_fn,
            self.rollouts,
            self.steps,
            directory,
            teachers={"teacher": self.teacher},
            before_batch=self.rollouts.draw,
            mesh=self.mesh,
            split_time=True,
        )
