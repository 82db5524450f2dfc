"""Files are written and read here byte by byte, without the library that our code uses.

What transformers reads and writes is held against ours in test_llama_parity.py.
"""

import json
import os
import shutil

import fsspec
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from etils.epath import backend

from distill_jax import models
from distill_jax.artifacts import InputError

SHAPE = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64}


def save_file(weights, path):
    """The format: the header's length in 8 bytes, the header as JSON, the bytes of all tensors."""
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    header, data = {}, b""
    for name, tensor in weights.items():
        offsets = [len(data), len(data) + tensor.nbytes]
        dtype, shape = names[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += tensor.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def load_file(path):
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8:start]), content[start:]
    assert header.pop("__metadata__") == {"format": "pt"}
    spans = sorted(entry["data_offsets"] for entry in header.values())
    assert [begin for begin, _ in spans] + [len(data)] == [0] + [end for _, end in spans]
    tensors = {}
    for name, entry in header.items():
        flat = np.frombuffer(data[slice(*entry["data_offsets"])], DTYPES[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


def tensors(dtype=np.float32):
    shapes = {
        "model.embed_tokens.weight": (32, 16),
        "model.norm.weight": (16,),
        "lm_head.weight": (32, 16),
    }
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (16,),
            prefix + "post_attention_layernorm.weight": (16,),
            prefix + "self_attn.q_proj.weight": (24, 16),
            prefix + "self_attn.k_proj.weight": (12, 16),
            prefix + "self_attn.v_proj.weight": (12, 16),
            prefix + "self_attn.o_proj.weight": (16, 24),
            prefix + "mlp.gate_proj.weight": (24, 16),
            prefix + "mlp.up_proj.weight": (24, 16),
            prefix + "mlp.down_proj.weight": (16, 24),
        }
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def write_folder(folder, weights, **changes):
    folder.mkdir(exist_ok=True)
    config = {key: value for key, value in (SHAPE | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


def write_sharded(folder, weights, index_changes=()):
    write_folder(folder, weights)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, name in enumerate(sorted(weights)):
        weight_map[name] = f"part-{number % 3}.safetensors"
    for file in set(weight_map.values()):
        part = {name: weights[name] for name in weights if weight_map[name] == file}
        save_file(part, folder / file)
    index = {"metadata": {}, "weight_map": weight_map | dict(index_changes)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def model(random_model):
    config = models.LlamaConfig(
        vocab_size=32, embed=16, mlp=24, layers=2, heads=4, kv_heads=2, head_dim=6, tied=False
    )
    return random_model(config)


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype, left, right))


def test_every_parameter_takes_its_tensor_in_our_axis_order(tmp_path):
    weights = tensors()
    params = models.load(write_folder(tmp_path, weights)).params
    assert_same(params["embedding"], weights["model.embed_tokens.weight"])
    assert_same(params["unembedding"], weights["lm_head.weight"].T)
    assert_same(params["final_norm"], weights["model.norm.weight"])
    for layer in range(2):
        attention = {k: v[layer] for k, v in params["layers"]["attention"].items()}
        mlp = {k: v[layer] for k, v in params["layers"]["mlp"].items()}
        prefix = f"model.layers.{layer}."
        assert_same(attention["norm"], weights[prefix + "input_layernorm.weight"])
        assert_same(mlp["norm"], weights[prefix + "post_attention_layernorm.weight"])
        for name, heads in (("query", 4), ("key", 2), ("value", 2)):
            stored = weights[prefix + f"self_attn.{name[0]}_proj.weight"]
            assert_same(attention[name], stored.T.reshape(16, heads, 6))
        stored = weights[prefix + "self_attn.o_proj.weight"]
        assert_same(attention["output"], stored.T.reshape(4, 6, 16))
        for name in ("gate", "up", "down"):
            assert_same(mlp[name], weights[prefix + f"mlp.{name}_proj.weight"].T)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_stored_types_are_read_exactly_and_cast(tmp_path, dtype):
    weights = tensors(dtype)
    folder = write_folder(tmp_path, weights)
    assert_same(
        models.load(folder).params["embedding"],
        weights["model.embed_tokens.weight"].astype(np.float32),
    )
    assert models.load(folder, dtype=jnp.bfloat16).params["embedding"].dtype == jnp.bfloat16


def test_shards_give_what_one_file_gives(tmp_path):
    whole = models.load(write_folder(tmp_path / "whole", tensors()))
    sharded = models.load(write_sharded(tmp_path / "sharded", tensors()))
    assert_same(sharded.params, whole.params)


def test_parameters_arrive_sharded_when_asked(tmp_path):
    folder = write_folder(tmp_path, tensors())
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
    mesh_axis = {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}
    whole = models.load(folder)
    shardings = jax.tree.map(
        lambda axes: jax.NamedSharding(mesh, jax.P(*map(mesh_axis.get, axes))),
        models.logical_axes(whole.config),
        is_leaf=lambda node: isinstance(node, tuple),
    )
    sharded = models.load(folder, shardings=shardings)
    assert_same(sharded.params, whole.params)
    gate = sharded.params["layers"]["mlp"]["gate"]
    assert gate.sharding == shardings["layers"]["mlp"]["gate"]
    assert gate.addressable_shards[0].data.shape == (2, 4, 12)


def test_layers_may_be_sharded_too(tmp_path):
    folder = write_folder(tmp_path, tensors())
    mesh = jax.make_mesh((2,), ("stage",), devices=jax.devices()[:2])
    whole = models.load(folder)
    shardings = jax.tree.map(
        lambda axes: jax.NamedSharding(mesh, jax.P("stage" if axes[0] == "layers" else None)),
        models.logical_axes(whole.config),
        is_leaf=lambda node: isinstance(node, tuple),
    )
    assert_same(models.load(folder, shardings=shardings).params, whole.params)


def test_every_missing_extra_and_misshapen_tensor_is_named(tmp_path):
    weights = tensors()
    del weights["model.norm.weight"], weights["lm_head.weight"]
    weights["model.layers.7.mlp.up_proj.weight"] = np.zeros(3, np.float32)
    weights[Q_PROJ] = np.zeros((24, 15), np.float32)
    with pytest.raises(InputError) as caught:
        models.load(write_folder(tmp_path, weights))
    message = str(caught.value)
    assert "missing model.norm.weight; missing lm_head.weight" in message
    assert "extra model.layers.7.mlp.up_proj.weight" in message
    assert f"{Q_PROJ} has shape (24, 15), not (24, 16)" in message
    assert message.count(";") == 3
    assert "\n" not in message


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "a/b", "..", "", 3])
def test_an_index_cannot_point_outside_its_folder(tmp_path, file):
    weights = tensors()
    save_file(weights, tmp_path / "outside.safetensors")
    folder = write_sharded(tmp_path / "model", weights, {"lm_head.weight": file})
    with pytest.raises(InputError, match=r"index\.json: lm_head|3: no such file"):
        models.load(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    folder = write_sharded(tmp_path, tensors())
    shutil.copy(folder / "part-0.safetensors", folder / "part-1.safetensors")
    with pytest.raises(InputError, match=r"part-1\.safetensors: .* is in another file too"):
        models.load(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:5],
        lambda content: content[:100],
        lambda content: content[:-1],
        lambda content: content.replace(b'"F32"', b'"F33"', 1),
        lambda content: content.replace(b'"shape": [16]', b'"shape": [17]', 1),
        lambda content: content.replace(b'"data_offsets": [0', b'"data_offsets": [9', 1),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, damage):
    file = write_folder(tmp_path, tensors()) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert file.read_bytes() != whole
    with pytest.raises(InputError, match=r"model\.safetensors: cannot be read as") as caught:
        models.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_tensor_that_is_no_float_is_refused(tmp_path):
    weights = tensors() | {"model.norm.weight": np.zeros(16, np.int64)}
    with pytest.raises(InputError, match=r"model\.safetensors: model\.norm\.weight is I64"):
        models.load(write_folder(tmp_path, weights))


def test_a_tied_model_may_hold_a_copy_of_its_embedding_but_nothing_else(tmp_path):
    weights = tensors()
    with pytest.raises(InputError, match=r"lm_head\.weight differs"):
        models.load(write_folder(tmp_path, weights, tie_word_embeddings=True))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    model = models.load(write_folder(tmp_path, weights, tie_word_embeddings=True))
    assert "unembedding" not in model.params


def test_stored_rotary_frequencies_are_passed_over(tmp_path):
    weights = tensors()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(3, np.float32)
    models.load(write_folder(tmp_path, weights))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_size": None}, "hidden_size is None, not int"),
        ({"hidden_size": "16"}, "hidden_size is '16', not int"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True, not int"),
        ({"num_key_value_heads": 3}, "not a multiple of kv_heads"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rope_scaling: .*low_freq"),
        ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3'"),
    ],
)
def test_a_config_that_is_no_plain_llama_is_refused(tmp_path, change, complaint):
    with pytest.raises(InputError, match=complaint):
        models.load(write_folder(tmp_path, tensors(), **change))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 5000])
def test_export_then_import_is_bit_exact(tmp_path, model, dtype, max_shard_bytes):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), model.params)
    model = models.Model(model.config, params)
    models.export_hugging_face(tmp_path, model, max_shard_bytes=max_shard_bytes)
    back = models.load(tmp_path, dtype=dtype)
    assert back.config == models.load_config(tmp_path) == model.config
    assert_same(back.params, model.params)


def test_exported_files_hold_what_the_format_says(tmp_path, model):
    models.export_hugging_face(tmp_path / "whole", model)
    models.export_hugging_face(tmp_path / "parts", model, max_shard_bytes=5000)
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    files = {path.name for path in (tmp_path / "parts").glob("*.safetensors")}
    assert len(files) > 2
    assert set(index["weight_map"].values()) == files
    assert index["metadata"]["total_size"] == 4 * model.config.parameters
    parts = {}
    for file in files:
        tensors_of_file = load_file(tmp_path / "parts" / file)
        assert sum(tensor.nbytes for tensor in tensors_of_file.values()) <= 5000
        assert {index["weight_map"][name] for name in tensors_of_file} == {file}
        parts |= tensors_of_file
    assert parts.keys() == whole.keys()
    for name, tensor in whole.items():
        np.testing.assert_array_equal(parts[name], tensor)
    query = model.params["layers"]["attention"]["query"][1]
    np.testing.assert_array_equal(whole[Q_PROJ], np.asarray(query).reshape(16, 24).T)


def test_a_bucket_is_written_and_read_like_a_folder(tmp_path, model, monkeypatch):
    memory, local = fsspec.filesystem("memory"), fsspec.filesystem("file")
    monkeypatch.setattr(
        backend.fsspec_backend,
        "fs",
        lambda path: memory if os.fspath(path).startswith("gs://") else local,
    )
    bucket = epath.Path("gs://distill-jax/model")
    models.export_hugging_face(bucket, model, max_shard_bytes=5000)
    assert_same(models.load(bucket).params, model.params)
    models.export_hugging_face(tmp_path, model, max_shard_bytes=5000)
    written = {file.name: file.read_bytes() for file in bucket.iterdir()}
    assert written == {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    (bucket / min(name for name in written if name.endswith(".safetensors"))).unlink()
    with pytest.raises(InputError, match=r"gs://.*safetensors: no such file"):
        models.load(bucket)


def test_an_export_that_was_cut_off_leaves_no_model(tmp_path, model, monkeypatch):
    models.export_hugging_face(tmp_path, model)
    with monkeypatch.context() as patch:
        patch.setattr("distill_jax.artifacts.write_bytes", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            models.export_hugging_face(tmp_path, model)
    assert not list(tmp_path.iterdir())
    models.export_hugging_face(tmp_path, model)
    assert_same(models.load(tmp_path).params, model.params)


def test_an_export_replaces_the_one_before_and_leaves_other_files(tmp_path, model):
    models.export_hugging_face(tmp_path, model, max_shard_bytes=5000)
    (tmp_path / "tokenizer.json").write_text("{}")
    models.export_hugging_face(tmp_path, model, eos_id=[5, 7])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == [5, 7]


def test_sharded_parameters_export_like_whole_ones(tmp_path, model):
    mesh = jax.make_mesh((8,), ("fsdp",))
    rows = jax.NamedSharding(mesh, jax.P("fsdp"))
    params = model.params | {"embedding": jax.device_put(model.params["embedding"], rows)}
    models.export_hugging_face(tmp_path, models.Model(model.config, params))
    assert_same(models.load(tmp_path).params, model.params)


def test_what_others_cannot_hold_is_not_exported(tmp_path, model):
    with pytest.raises(InputError, match="cannot export weights as int8"):
        models.export_hugging_face(tmp_path / "new", model, dtype=jnp.int8)
    narrow = models.LlamaConfig(
        vocab_size=8, embed=10, mlp=4, layers=1, heads=4, kv_heads=2, head_dim=4, tied=True
    )
    with pytest.raises(InputError, match="embed is 10, not a multiple of heads 4"):
        models.config_to_hugging_face(narrow)
    assert not (tmp_path / "new").exists()


def test_a_folder_without_weights_or_config_says_so(tmp_path):
    with pytest.raises(InputError, match=r"neither model\.json nor config\.json"):
        models.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    with pytest.raises(InputError, match=r"model\.safetensors: no such file"):
        models.load(tmp_path)
