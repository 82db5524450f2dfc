import dataclasses

import jax
import numpy as np
import pytest
import tiny

from distill_jax import models, parallel
from distill_jax.artifacts import InputError
from distill_jax.pruning import (
    Plan,
    PruneConfig,
    Scores,
    apply_plan,
    merge_query_heads,
    prune,
)

SOURCE = dataclasses.replace(tiny.SOURCE, embed=16, vocab_size=32)
TARGET = dataclasses.replace(SOURCE, layers=3, embed=8, mlp=12, heads=4, kv_heads=2, tied=True)


@pytest.fixture(scope="module")
def batches():
    return tiny.split(tiny.rows(24, vocab_size=32), 8)


@pytest.mark.slow
def test_prune_writes_scores_and_plan_and_can_be_repeated(tmp_path, batches):
    config = PruneConfig(target=TARGET, calibration_rows=12)
    student, figures = prune(tiny.model(SOURCE), batches, config, tmp_path / "a")
    again, same = prune(tiny.model(SOURCE), iter(batches), config, tmp_path / "b")
    assert figures == same
    assert figures["calibration_rows"] == 12
    assert figures["parameters"] == sum(x.size for x in jax.tree.leaves(student.params))
    assert figures["repair"] == "in_sequence"
    jax.tree.map(np.testing.assert_array_equal, student.params, again.params)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "plan.json",
        "scores.safetensors",
    ]
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert (
        Scores.load(tmp_path / "a" / "scores.safetensors").rows
        == figures["calibration_fingerprint"]
    )
    models.logits(student.config, student.params, batches[0]["tokens"])


def test_prune_without_repair_is_the_plan_alone(tmp_path):
    model = tiny.model(SOURCE)
    config = PruneConfig(target=TARGET, method="magnitude", repair=False)
    student, figures = prune(model, [], config, tmp_path)
    expected = apply_plan(Plan.load(tmp_path / "plan.json"), model.params)
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-6),
        student.params,
        expected,
    )
    assert figures["repair"] == "none"


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"repair": False}, {"repair_order": "at_once"}], ids=str)
def test_heads_are_merged_before_the_cut(tmp_path, batches, options):
    model = tiny.model(SOURCE)
    target = dataclasses.replace(SOURCE, heads=4)
    config = PruneConfig(target=target, head_choice="merge", **options)
    student, _ = prune(model, batches, config, tmp_path)
    scores = Scores.load(tmp_path / "scores.safetensors")
    plan = Plan.load(tmp_path / "plan.json")
    merged = apply_plan(plan, merge_query_heads(plan, scores, model.params))
    query = student.params["layers"]["attention"]["query"]
    np.testing.assert_allclose(query, merged["layers"]["attention"]["query"], rtol=1e-6)
    assert not np.allclose(query, apply_plan(plan, model.params)["layers"]["attention"]["query"])


@pytest.mark.slow
@pytest.mark.parametrize("order", ["at_once", "in_sequence"])
def test_prune_on_eight_devices(tmp_path, batches, order):
    # The last batch's rows do not divide over the mesh.
    config = PruneConfig(target=TARGET, calibration_rows=14, repair_order=order, ridge=0.1)
    one, _ = prune(tiny.model(SOURCE), batches, config, tmp_path / "one")
    mesh = parallel.make_mesh(parallel.MeshConfig(fsdp=4, tensor=2))
    model = tiny.model(SOURCE)
    placed = parallel.shardings(mesh, models.logical_axes(SOURCE), model.params)
    model = models.Model(SOURCE, jax.device_put(model.params, placed))
    eight, _ = prune(model, batches, config, tmp_path / "eight", mesh=mesh)
    assert len(eight.params["layers"]["mlp"]["down"].sharding.device_set) == 8
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=5e-3, atol=5e-3),
        eight.params,
        one.params,
    )
    plans = [Plan.load(tmp_path / name / "plan.json") for name in ("one", "eight")]
    assert all("kept" not in line for line in plans[0].diff(plans[1]))


def test_a_wrong_target_is_refused_before_anything_is_read(tmp_path):
    def unread():
        raise AssertionError("the batches were read")
        yield

    config = PruneConfig(target=dataclasses.replace(TARGET, mlp=21))
    with pytest.raises(InputError, match=r"target\.mlp is 21, larger"):
        prune(tiny.model(SOURCE), unread(), config, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_wrong_fields():
    with pytest.raises(InputError, match="layer_choice is 'nope'"):
        PruneConfig(target=TARGET, layer_choice="nope")
    with pytest.raises(InputError, match="kv_choice is 'nope'"):
        PruneConfig(target=TARGET, kv_choice="nope")
    with pytest.raises(InputError, match="calibration_rows is 0"):
        PruneConfig(target=TARGET, calibration_rows=0)
    with pytest.raises(InputError, match="sequence_rows is 0"):
        PruneConfig(target=TARGET, sequence_rows=0)
    with pytest.raises(InputError, match="repair_order is 'twice'; choose one of at_once"):
        PruneConfig(target=TARGET, repair_order="twice")
    with pytest.raises(InputError, match="ridge is 0"):
        PruneConfig(target=TARGET, ridge=0.0)
