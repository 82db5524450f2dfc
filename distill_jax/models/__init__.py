"""Llama in Flax NNX: its shapes, its forward pass, its weights in and out, generation."""

from distill_jax.models.averaging import average
from distill_jax.models.checkpoint import is_saved, load, load_config, remove, save
from distill_jax.models.config import LlamaConfig, RopeScaling
from distill_jax.models.generation import Completion, generate
from distill_jax.models.gguf import load_gguf
from distill_jax.models.hugging_face import (
    export_hugging_face,
    load_hugging_face,
    open_hugging_face,
    write_hugging_face,
)
from distill_jax.models.hugging_face_config import (
    config_from_hugging_face,
    config_to_hugging_face,
)
from distill_jax.models.llama import (
    Llama,
    Model,
    Params,
    Reading,
    abstract_params,
    hidden_states,
    init_params,
    logical_axes,
    logits,
    merge,
    unembedding,
)
from distill_jax.models.presets import (
    LLAMA_3_1_8B,
    LLAMA_3_1_70B,
    LLAMA_3_2_1B,
    LLAMA_3_2_3B,
    SMOLLM2_135M,
)
from distill_jax.models.sampling import Sampling

__all__ = [
    "LLAMA_3_1_8B",
    "LLAMA_3_1_70B",
    "LLAMA_3_2_1B",
    "LLAMA_3_2_3B",
    "SMOLLM2_135M",
    "Completion",
    "Llama",
    "LlamaConfig",
    "Model",
    "Params",
    "Reading",
    "RopeScaling",
    "Sampling",
    "abstract_params",
    "average",
    "config_from_hugging_face",
    "config_to_hugging_face",
    "export_hugging_face",
    "generate",
    "hidden_states",
    "init_params",
    "is_saved",
    "load",
    "load_config",
    "load_gguf",
    "load_hugging_face",
    "logical_axes",
    "logits",
    "merge",
    "open_hugging_face",
    "remove",
    "save",
    "unembedding",
    "write_hugging_face",
]
