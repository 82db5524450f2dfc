"""Shapes of published Llamas."""

from distill_jax.models.config import LlamaConfig, RopeScaling

LLAMA_3_1_70B = LlamaConfig(
    vocab_size=128_256,
    embed=8192,
    mlp=28_672,
    layers=80,
    heads=64,
    kv_heads=8,
    head_dim=128,
    tied=False,
    rope_scaling=RopeScaling(factor=8.0),
)
"""The shape of Llama 3.1 70B."""

LLAMA_3_1_8B = LlamaConfig(
    vocab_size=128_256,
    embed=4096,
    mlp=14_336,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    tied=False,
    rope_scaling=RopeScaling(factor=8.0),
)
"""The shape of Llama 3.1 8B."""

LLAMA_3_2_3B = LlamaConfig(
    vocab_size=128_256,
    embed=3072,
    mlp=8192,
    layers=28,
    heads=24,
    kv_heads=8,
    head_dim=128,
    tied=True,
    rope_scaling=RopeScaling(factor=32.0),
)
"""The shape of Llama 3.2 3B."""

LLAMA_3_2_1B = LlamaConfig(
    vocab_size=128_256,
    embed=2048,
    mlp=8192,
    layers=16,
    heads=32,
    kv_heads=8,
    head_dim=64,
    tied=True,
    rope_scaling=RopeScaling(factor=32.0),
)
"""The shape of Llama 3.2 1B."""

SMOLLM2_135M = LlamaConfig(
    vocab_size=49_152,
    embed=576,
    mlp=1536,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    tied=True,
    rope_theta=100_000.0,
    context=8192,
)
"""The shape of SmolLM2 135M."""


def by_name(name: str) -> LlamaConfig | None:
    """The shape that a folder's or file's name speaks of, such as "Llama-3.1-8B-Instruct".

    Of a path its last part is looked at.
    """
    plain = _plain(name.rstrip("/").rpartition("/")[2])
    return next((shape for known, shape in _SHAPES.items() if _plain(known) in plain), None)


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name)).lower()


_SHAPES = {name: value for name, value in globals().items() if isinstance(value, LlamaConfig)}
