"""The planner with the real compiler, which only some machines have; nothing is executed."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distill_jax import cli, losses, models, parallel, training
from distill_jax.artifacts import InputError
from distill_jax.parallel import Topology
from distill_jax.parallel.tpu_cost import estimate
from distill_jax.planning.program import described

libtpu = pytest.importorskip("libtpu", reason="the TPU compiler (libtpu) is not installed")
pytestmark = pytest.mark.slow

CONFIG = str(pathlib.Path(__file__).parents[2] / "configs" / "tiny.py")


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTILL_JAX_CACHE", str(tmp_path / "cache"))


def planned(capsys, *options):
    arguments = ["compile", CONFIG, "--set", "size=test", "--topology", "v5e:4x4", *options]
    assert cli.main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("stage", ["distill", "targets", "prune", "sft", "on-policy", "dpo"])
def test_every_stage_compiles(stage, capsys):
    line = planned(capsys, "--stage", stage, "--batch", "8", "--set", "on_policy=minillm")
    assert line["fits"]
    assert line["hbm_gb"] > 0
    programs = line.get("reports", [line])
    assert any(one["collectives"] for one in programs)
    for one in programs:
        # of a model so small each device writes with parameters of its own
        assert one["collectives"] or stage == "on-policy"
        # no program can beat the matrix units
        assert one["step_s"] > one["flops"] / 16 / 197e12
        assert sum(one["scopes_s"].values()) == pytest.approx(
            sum(one["step_parts_s"][name] for name in ("compute", "kernels", "collectives"))
        )


def test_what_is_alive_comes_to_the_compilers_own_peak(capsys):
    """`peak_memory_in_bytes` holds the arguments, and VMEM: HBM must be most of it."""
    line = planned(capsys, "--batch", "16", "--set", "size=default")
    arguments = sum(
        size
        for name, size in line["hbm_parts_gb"].items()
        if name in ("parameters", "optimizer", "batch", "padding")
    )
    modelled = arguments + sum(line["hbm_alive_gb"].values())
    assert modelled == pytest.approx(line["hbm_peak_gb"], rel=0.1)


def test_an_answer_is_kept(capsys, monkeypatch):
    first = planned(capsys, "--batch", "1")
    monkeypatch.setattr("distill_jax.planning.worker.COMMAND", ("false",))
    assert planned(capsys, "--batch", "1") == first


def test_a_mesh_that_does_not_divide_is_refused(capsys):
    arguments = ["compile", CONFIG, "--topology", "v5e:4x4", "--mesh", "data=3"]
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "data=3, fsdp=-1, sequence=1, tensor=1) does not arrange 16 devices" in said[0]


def test_a_mesh_that_splits_an_axis_of_the_slice_is_refused():
    devices = Topology.parse("v6e:16x16").devices()
    with pytest.raises(
        InputError,
        match="data 16, fsdp 8 with 1 along a second axis, sequence 1, tensor 2 does not lie along "
        "the axes",
    ):
        parallel.make_mesh(parallel.MeshConfig(data=16, tensor=2), devices)


@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_refusals_say_what_there_is(name):
    """Two results of 40 GB for each GB that a chip has."""
    topology = Topology.parse(name)
    mesh = parallel.make_mesh(None, topology.devices())
    whole = NamedSharding(mesh, P())
    side = int((topology.chip.hbm * 10) ** 0.5)
    big = jax.ShapeDtypeStruct((side, side), jnp.float32, sharding=whole)
    lowered = jax.jit(lambda x: x * 2, out_shardings=whole).lower(big)
    with pytest.raises(parallel.OutOfMemory) as caught:
        parallel.compile_lowered(lowered)
    assert caught.value.available == pytest.approx(topology.chip.hbm)
    assert caught.value.needed > 8 * topology.chip.hbm


@pytest.mark.parametrize("name", ["v5e:4x4", "v5p:2x2x4", "v6e:4x4"])
def test_the_compiler_knows_the_options_of_every_chip(name):
    """Warnings are errors here, and one that it does not know warns."""
    devices = Topology.parse(name).devices()
    assert parallel.compiler_options(parallel.make_mesh(None, devices))
    with pytest.warns(UserWarning, match="xla_no_such_option"):
        assert not parallel.options._are_accepted((("xla_no_such_option", True),), devices[0])


@pytest.mark.parametrize("name", ["v5e:4x4", "v5p:2x2x4", "v6e:4x4"])
def test_collectives_go_beside_work(name):
    """Gradients are scattered while the next are computed, parameters gathered before their turn.

    What is last, or first, has nothing to go beside. Without the options all of their time is
    waited for, but for gathers on v5e.
    """
    topology = Topology.parse(name)
    mesh = parallel.make_mesh(None, topology.devices())
    assert parallel.compiler_options(mesh)
    shape = models.LlamaConfig(
        vocab_size=1024,
        embed=512,
        layers=2,
        heads=4,
        kv_heads=4,
        head_dim=128,
        mlp=2048,
        tied=True,
    )
    loss = training.language_model_loss(
        shape, losses.hard_labels(), remat="full", compute_dtype="bfloat16", mesh=mesh
    )
    jitted = training.jit_step(
        models.abstract_params(shape),
        models.logical_axes(shape),
        loss,
        training.TrainConfig(steps=1, batch_rows=16),
        mesh,
    )
    rows = {name: np.ones(1024, np.int32) for name in ("tokens", "labels", "segment_ids")}
    rows["where"] = np.ones(1024, np.float32)
    batch = {name: described(row, 16, jitted.rows) for name, row in rows.items()}
    compiled = parallel.compile_lowered(jitted.function.lower(jitted.state, batch))
    collectives = estimate(compiled, topology.chip).collectives
    for kind in ("reduce-scatter",) if name.startswith("v5e") else ("reduce-scatter", "all-gather"):
        assert collectives[kind].waits < 0.9 * collectives[kind].seconds, kind
