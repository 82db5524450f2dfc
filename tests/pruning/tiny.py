"""Small shapes and seeded inputs for the pruning tests."""

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import models
from distill_jax.pruning import Scores

SCALING = models.RopeScaling(factor=8.0, original_context=64)
SOURCE = models.LlamaConfig(
    vocab_size=31,
    embed=12,
    mlp=20,
    layers=4,
    heads=8,
    kv_heads=4,
    head_dim=8,
    tied=False,
    rope_theta=1e4,
    rope_scaling=SCALING,
)
EVERYTHING = {
    "layers": 2,
    "embed": 7,
    "mlp": 9,
    "heads": 2,
    "kv_heads": 2,
    "head_dim": 4,
    "tied": True,
}
"""A cut of `SOURCE` along every axis."""


def model(config=SOURCE, seed=0, scale=0.2):
    """A model whose weights are large enough that attention and norms do something."""
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        normal = random.normal(size=leaf.shape).astype(np.float32)
        is_norm = "norm" in path[-1].key
        return jnp.asarray(1 + 0.3 * normal if is_norm else scale * normal)

    abstract = models.abstract_params(config)
    return models.Model(config, jax.tree_util.tree_map_with_path(draw, abstract))


def rows(count=16, time=12, vocab_size=SOURCE.vocab_size, seed=0):
    """Packed rows: two documents, then padding; the last row is padding only."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, vocab_size, (count, time), dtype=np.int32)
    segments = np.zeros((count, time), np.int32)
    for row in segments[:-1]:
        first, second = sorted(random.choice(np.arange(1, time + 1), 2, replace=False))
        row[:first], row[first:second] = 1, 2
    return {"tokens": tokens, "segment_ids": segments}


def split(batch, size):
    """The same rows as batches of `size` rows."""
    count = len(batch["tokens"])
    return [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, count, size)]


def random_scores(config, seed=0):
    """Scores that no two parts share, with uneven channel powers."""
    random = np.random.default_rng(seed)
    L, D = config.layers, config.embed
    shapes = {
        "layers": (L,),
        "heads": (L, config.heads),
        "kv_heads": (L, config.kv_heads),
        "mlp": (L, config.mlp),
        "embed": (D,),
        "attention_power": (L, D),
        "mlp_power": (L, D),
        "final_power": (D,),
    }
    arrays = {k: random.uniform(0.2, 2.0, shape).astype(np.float32) for k, shape in shapes.items()}
    return Scores(**arrays, method="test", model="m", rows="r")
