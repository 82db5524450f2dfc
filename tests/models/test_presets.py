import json
import math

import jax
import jax.numpy as jnp
import pytest

from distill_jax import models


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (models.LLAMA_3_1_70B, 70.554e9),
        (models.LLAMA_3_1_8B, 8.030e9),
        (models.LLAMA_3_2_3B, 3.213e9),
        (models.LLAMA_3_2_1B, 1.236e9),
        (models.SMOLLM2_135M, 134.515e6),
    ],
)
def test_presets_have_the_published_number_of_parameters(config, published):
    leaves = jax.tree.leaves(models.abstract_params(config))
    counted = sum(math.prod(leaf.shape) for leaf in leaves)
    assert counted == config.parameters
    assert counted == pytest.approx(published, rel=5e-4)


def test_metas_own_config_is_the_preset():
    value = json.loads("""{
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0,
        "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3"}, "rope_theta": 500000.0, "tie_word_embeddings": true,
        "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 128256}""")
    assert models.config_from_hugging_face(value, "config.json") == models.LLAMA_3_2_1B
    ours = models.config_to_hugging_face(
        models.LLAMA_3_2_1B, dtype=jnp.bfloat16, bos_id=128000, eos_id=128001
    )
    assert {key: value[key] for key in ours} == ours
