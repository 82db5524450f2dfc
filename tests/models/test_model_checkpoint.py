import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import models
from distill_jax.artifacts import InputError

CONFIG = models.LlamaConfig(
    vocab_size=32,
    embed=16,
    mlp=24,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=6,
    tied=False,
    rope_scaling=models.RopeScaling(factor=8.0),
)


@pytest.fixture(scope="module")
def model(random_model):
    return random_model(CONFIG)


def shardings(axis_sizes, names, mesh_axis):
    mesh = jax.make_mesh(axis_sizes, names)
    return jax.tree.map(
        lambda axes: jax.NamedSharding(mesh, jax.P(*map(mesh_axis.get, axes))),
        models.logical_axes(CONFIG),
        is_leaf=lambda node: isinstance(node, tuple),
    )


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype, left, right))


def test_what_is_saved_comes_back_bit_for_bit(tmp_path, model):
    models.save(tmp_path / "model", model)
    back = models.load(tmp_path / "model")
    assert back.config == models.load_config(tmp_path / "model") == model.config
    assert_same(back.params, model.params)
    json.loads((tmp_path / "model" / "model.json").read_text())


def test_bfloat16_is_kept_and_types_are_cast_on_loading(tmp_path, model):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)
    models.save(tmp_path, models.Model(CONFIG, half))
    assert_same(models.load(tmp_path, dtype=jnp.bfloat16).params, half)
    widened = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    assert_same(models.load(tmp_path).params, widened)


def test_a_checkpoint_moves_between_meshes(tmp_path, model):
    eight = shardings((4, 2), ("fsdp", "tensor"), {"embed": "fsdp", "mlp": "tensor"})
    models.save(tmp_path, models.Model(CONFIG, jax.device_put(model.params, eight)))
    assert_same(models.load(tmp_path).params, model.params)
    two = shardings((8,), ("fsdp",), {"mlp": "fsdp", "vocab": "fsdp"})
    loaded = models.load(tmp_path, shardings=two).params
    assert_same(loaded, model.params)
    assert jax.tree.map(lambda leaf: leaf.sharding, loaded) == two


def test_parameters_loaded_whole_go_where_a_computation_needs_them(tmp_path, model):
    models.save(tmp_path, model)
    params = models.load(tmp_path).params
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    tokens = jax.device_put(np.ones((8, 4), np.int32), jax.NamedSharding(mesh, jax.P("data")))
    assert models.logits(CONFIG, params, tokens).shape == (8, 4, 32)


def test_saving_again_replaces(tmp_path, model):
    models.save(tmp_path, model)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, model.params)
    models.save(tmp_path, models.Model(CONFIG, doubled))
    assert_same(models.load(tmp_path).params, doubled)


def test_a_save_that_was_cut_off_is_no_model_and_can_be_repeated(tmp_path, model, monkeypatch):
    models.save(tmp_path, model)
    with monkeypatch.context() as patch:
        patch.setattr("distill_jax.artifacts.write_json", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            models.save(tmp_path, model)
    with pytest.raises(InputError, match=r"neither model\.json nor config\.json"):
        models.load(tmp_path)
    models.save(tmp_path, model)
    assert_same(models.load(tmp_path).params, model.params)


@pytest.mark.parametrize("write", [models.save, models.export_hugging_face])
def test_parameters_that_do_not_fit_the_config_are_not_written(tmp_path, model, write):
    write(tmp_path, model)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    broken = models.Model(CONFIG, model.params | {"final_norm": np.ones(15, np.float32)})
    with pytest.raises(InputError, match=r"final_norm has shape \(15,\), not \(16,\)"):
        write(tmp_path, broken)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_parameters_of_another_shape_are_named(tmp_path, model):
    models.save(tmp_path, model)
    description = json.loads((tmp_path / "model.json").read_text())
    description["config"] |= {"mlp": 25, "tied": True}
    (tmp_path / "model.json").write_text(json.dumps(description))
    with pytest.raises(InputError) as caught:
        models.load(tmp_path)
    assert "extra unembedding" in str(caught.value)
    assert "layers/mlp/down has shape (2, 24, 16), not (2, 25, 16)" in str(caught.value)


@pytest.mark.parametrize(
    ("description", "complaint"),
    [
        ("[]", "not a model description"),
        ("{", "not valid JSON"),
        ('{"format": 9, "config": {}}', "not a model description"),
        ('{"format": 1, "config": {"vocab_size": 3}}', "not a Llama config"),
        ('{"format": 1}', "not a model description"),
    ],
)
def test_a_wrong_description_is_refused(tmp_path, description, complaint):
    (tmp_path / "model.json").write_text(description)
    for read in (models.load, models.load_config):
        with pytest.raises(InputError, match=complaint):
            read(tmp_path)


def test_missing_parameters_and_paths_are_refused(tmp_path, model):
    with pytest.raises(InputError, match="no such file or directory"):
        models.load(tmp_path / "nowhere")
    models.save(tmp_path, model)
    (tmp_path / "params").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="params: no such directory"):
        models.load(tmp_path)
    (tmp_path / "params").mkdir()
    with pytest.raises(InputError, match="params: not an Orbax checkpoint"):
        models.load(tmp_path)


def test_damaged_arrays_are_reported(tmp_path, model):
    models.save(tmp_path, model)
    file = max((tmp_path / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:100])
    # A process of its own: reads still under way when Orbax gives up end in stray warnings.
    program = f"from distill_jax import models; models.load({str(tmp_path)!r})"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert f"distill_jax.artifacts.InputError: {tmp_path}/params: damaged (" in ended.stderr
