import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny

from distill_jax import models
from distill_jax.artifacts import InputError
from distill_jax.pruning import apply_plan, make_plan, prune_files

SOURCE = dataclasses.replace(tiny.SOURCE, embed=16)
TARGET = dataclasses.replace(
    SOURCE, layers=2, embed=12, mlp=9, heads=4, kv_heads=2, head_dim=4, tied=True
)
SCORES = dataclasses.replace(
    tiny.random_scores(SOURCE), layers=np.array([0.1, 0.9, 0.2, 0.8], np.float32)
)
PLAN = make_plan(SCORES, SOURCE, TARGET)
SMALL = 2000
"""Bytes of a file: every model here takes several."""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_files_are_those_of_surgery_in_memory(tmp_path, dtype, tied):
    plan = make_plan(SCORES, SOURCE, dataclasses.replace(TARGET, tied=tied))
    params = jax.tree.map(lambda x: x.astype(dtype), tiny.model(SOURCE).params)
    ids = {"bos_id": 1, "eos_id": [2, 3]}
    models.export_hugging_face(
        tmp_path / "source", models.Model(SOURCE, params), max_shard_bytes=SMALL, **ids
    )
    student = models.Model(plan.target, apply_plan(plan, params))
    models.export_hugging_face(tmp_path / "memory", student, max_shard_bytes=SMALL, **ids)
    prune_files(plan, tmp_path / "source", tmp_path / "files", max_shard_bytes=SMALL)
    names = sorted(path.name for path in (tmp_path / "memory").iterdir())
    assert len(names) > 4
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == names
    for name in names:
        got, want = ((tmp_path / place / name).read_bytes() for place in ("files", "memory"))
        assert got == want, name


def test_wrong_folders(tmp_path):
    model = tiny.model(SOURCE)
    source, out = tmp_path / "source", tmp_path / "out"
    models.export_hugging_face(source, model)
    other = dataclasses.replace(SOURCE, mlp=24)
    wrong = make_plan(tiny.random_scores(other), other, TARGET)
    with pytest.raises(
        InputError, match=r"source: not the model that the plan cuts \(mlp: 20 -> 24"
    ):
        prune_files(wrong, source, out)
    with pytest.raises(InputError, match="would be overwritten while it is read"):
        prune_files(PLAN, source, tmp_path / "." / "source")
    few = dataclasses.replace(TARGET, kv_heads=1)
    merging = make_plan(SCORES, SOURCE, few, kv_choice="merge")
    with pytest.raises(InputError, match="the plan merges key/value heads"):
        prune_files(merging, source, out)
    (source / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"model\.safetensors: cannot be read"):
        prune_files(PLAN, source, out)
    assert not out.exists()


def test_a_tensor_of_another_type_is_refused(tmp_path):
    params = tiny.model(SOURCE).params
    models.export_hugging_face(tmp_path, models.Model(SOURCE, params))
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="of several types: float16, float32"):
        prune_files(PLAN, tmp_path, tmp_path / "out")
