"""A small tokenizer with ChatML's special tokens and a small model, for this folder's tests."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from distill_jax import data, models, parallel, stages
from distill_jax.stages import context

TEXTS = [
    "What is the capital of France? The capital of France is Paris.",
    "assistant user system <|im_start|> <|im_end|> Hello, how are you today?",
    "What is 7 + 5? 12. Which is larger, 3 or 9? 9 is larger than 3.",
] * 4


@pytest.fixture(scope="session")
def tokenizer() -> data.Tokenizer:
    return data.train_tokenizer(TEXTS, 340, specials=("<|im_start|>", "<|im_end|>"))


@pytest.fixture(scope="session")
def random_model() -> Callable[..., models.Model]:
    """(vocab_size, seed) -> a tiny Llama far from uniform, made in NumPy to save compilations."""

    def make(vocab_size: int, seed: int = 0) -> models.Model:
        config = models.LlamaConfig(
            vocab_size=vocab_size,
            embed=8,
            mlp=8,
            layers=1,
            heads=2,
            kv_heads=1,
            head_dim=4,
            tied=True,
            context=256,
        )
        source = np.random.default_rng(seed)
        params = jax.tree.map(
            lambda leaf: jnp.asarray(source.normal(scale=0.3, size=leaf.shape), jnp.float32),
            models.abstract_params(config),
        )
        return models.Model(config, params)

    return make


@pytest.fixture(scope="session")
def split() -> Callable[..., models.Model]:
    """(model, mesh) -> the model with its parameters spread over the mesh."""

    def spread(model: models.Model, mesh: jax.sharding.Mesh) -> models.Model:
        places = parallel.shardings(mesh, models.logical_axes(model.config), model.params)
        return models.Model(model.config, jax.device_put(model.params, places))

    return spread


@pytest.fixture
def run(tokenizer, random_model, tmp_path):
    """(recipe) -> the run of a recipe whose student has been distilled."""
    student = random_model(tokenizer.vocab_size)
    tokenizer.save(tmp_path / context.CORPUS)
    models.save(tmp_path / context.student(0), student)
    return lambda recipe: stages.Run(recipe, epath.Path(tmp_path))
