import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distill_jax import models, parallel
from distill_jax.parallel import OutOfMemory, Topology
from distill_jax.planning import Program, Report, make_report
from distill_jax.planning.report import memory_parts, shard_bytes, used_bytes

MESH = parallel.make_mesh(parallel.MeshConfig(data=2, fsdp=4), jax.devices())
SHAPE = models.LlamaConfig(
    vocab_size=1000, embed=64, mlp=128, layers=3, heads=4, kv_heads=2, head_dim=16, tied=True
)
# 3 layers of 64 * 16 * (4 + 2 + 2 + 4) + 3 * 64 * 128 + 2 * 64, a final norm, an embedding.
PARAMETERS = 3 * (12_288 + 24_576 + 128) + 64 + 64_000


def struct(shape, spec, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(MESH, spec))


def a_program(**changes):
    held = {
        "parameters": {"w": struct((64, 10), P("fsdp")), "norm": struct((10,), P())},
        "batch": struct((16, 8), P(("data", "fsdp")), jnp.int32),
    }
    defaults = {
        "name": "distill",
        "lower": lambda: None,
        "held": held,
        "mesh": MESH,
        "rows": 16,
        "batch": 2,
        "remat": "full",
        "tokens": 16 * 1024,
        "flops": 3e15,
        "total_tokens": 1e9,
        "notes": ("a note",),
    }
    return Program(**(defaults | changes))


HLO = """HloModule jit_step, is_scheduled=true

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0:T(256)} parameter(0)
  %a = f32[8] negate(%p), metadata={op_name="jit(step)/jvp(attention)/exp"}, \
backend_config={"window_config":{"estimated_cycles":"1200000000"}}
  %b = f32[8] negate(%p), metadata={op_name="jit(step)/add"}, \
backend_config={"window_config":{"estimated_cycles":"300000000"}}
  ROOT %g = f32[90000000]{0:T(1024)} all-gather(%b), replica_groups=[16,16]<=[256]
}"""


def compiled():
    stats = types.SimpleNamespace(
        argument_size_in_bytes=1000,
        temp_size_in_bytes=300,
        output_size_in_bytes=650,
        alias_size_in_bytes=600,
        peak_memory_in_bytes=1200,
    )
    arguments = jax.tree.leaves(a_program().held)
    return types.SimpleNamespace(
        as_text=lambda: HLO,
        memory_analysis=lambda: stats,
        args_info=arguments,
        input_shardings=[argument.sharding for argument in arguments],
    )


def test_a_chips_share_of_arguments():
    # w: 64 rows over 4, norm whole, batch: 16 rows over 8, four bytes each
    held = a_program().held
    assert shard_bytes(held["parameters"]) == (16 * 10 + 10) * 4
    assert shard_bytes(held["batch"]) == 2 * 8 * 4


def test_memory_by_part_adds_up_to_the_whole():
    stats = compiled().memory_analysis()
    parts = memory_parts({"parameters": 680.0, "batch": 64.0}, 744.0, stats)
    assert parts == {
        "parameters": 680,
        "batch": 64,
        "padding": 1000 - 680 - 64,
        "temporaries": 300,
        "results": 50,
    }
    assert sum(parts.values()) == parallel.tpu_cost.memory_bytes(stats) == 1350


def test_what_a_program_does_not_use_is_held_all_the_same():
    """`jit` drops an argument; a third array waits beside the program."""
    used, dropped = struct((64, 10), P("fsdp")), struct((32, 4), P("data"))
    made = jax.jit(lambda a, b: a["x"] * 2).lower({"x": used}, dropped).compile()
    assert used_bytes(made) == 16 * 10 * 4
    assert made.memory_analysis().argument_size_in_bytes == 16 * 10 * 4
    held = {"parameters": (used, dropped), "streams": struct((1000,), P())}
    stats = made.memory_analysis()
    known = {"memory_analysis": lambda: stats, "as_text": lambda: HLO}
    made = types.SimpleNamespace(
        args_info=made.args_info, input_shardings=made.input_shardings, **known
    )
    report = make_report(a_program(held=held), Topology.parse("v5e:16x16"), made)
    beside = 16 * 4 * 4 + 4000
    assert report.memory["parameters"] == 16 * 10 * 4 + 16 * 4 * 4
    assert "padding" not in report.memory
    assert report.hbm == sum(report.memory.values())
    assert report.hbm == parallel.tpu_cost.memory_bytes(stats) + beside
    assert report.peak == stats.peak_memory_in_bytes + beside
    assert report.fits


def test_what_waits_beside_must_fit_too():
    topology = Topology.parse("v5e:16x16")
    streams = struct((int(topology.chip.hbm / 4) - 200,), P())
    program = a_program(held=a_program().held | {"streams": streams})
    report = make_report(program, topology, compiled())
    assert not report.fits
    assert "of them for what waits beside it, there are 16.9" in report.problem
    assert report.line(None)["hbm_peak_gb"] == (4 * streams.size + 1200) / 1e9


def test_figures_by_hand():
    report = make_report(a_program(), Topology.parse("v5e:16x16"), compiled())
    assert report.fits
    assert (report.hbm, report.peak) == (1350, 1200)
    # 1.5e9 cycles at 1.5 GHz; 15/16 of 360 MB over a ring of 16, two links of 45 GB/s
    gather = 360e6 * 15 / 16 / 90e9
    assert report.compute == pytest.approx(1.0)
    assert report.step == pytest.approx(1.0 + gather)
    assert report.collectives == {
        "all-gather": {
            "count": 1,
            "bytes": pytest.approx(337.5e6),
            "seconds": pytest.approx(gather),
            "waits": pytest.approx(gather),
        }
    }
    assert report.parts == pytest.approx({"attention": 0.8, "other": 0.2 + gather})
    assert report.mfu == pytest.approx(3e15 / 256 / 197e12 / (1.0 + gather))
    speed = 16 * 1024 / (1.0 + gather) / 256
    assert report.tokens_per_second == pytest.approx(speed)
    # a billion tokens
    hours = 1e9 / (speed * 256) / 3600
    assert report.days == pytest.approx(hours / 24)
    assert report.chip_hours == pytest.approx(hours * 256)
    line = report.line(price=1.2)
    assert line["dollars"] == pytest.approx(1.2 * 256 * hours)
    assert line["hbm_gb"] == pytest.approx(1350e-9)
    assert line["step_s"] == report.step
    assert line["tokens_per_s_chip"] == pytest.approx(speed)
    needed = {"fits", "hbm_gb", "step_s", "mfu", "tokens_per_s_chip", "collectives"}
    assert needed <= json.loads(json.dumps(line)).keys()
    assert any("nothing was executed" in text for text in line["assumptions"])
    assert any("Only hardware can show" in text for text in line["assumptions"])
    assert report.line(None)["dollars"] is None


def test_a_text_that_cannot_be_read_leaves_what_the_compiler_says(monkeypatch):
    def fail(*_, **__):
        raise ValueError("no such loop")

    monkeypatch.setattr(parallel.tpu_cost, "estimate", fail)
    report = make_report(a_program(), Topology.parse("v5e:16x16"), compiled())
    assert (report.fits, report.hbm, report.peak, report.step) == (True, 1350, 1200, None)
    assert "could not be read (no such loop)" in report.assumptions[-1]


def test_without_tokens_there_are_no_days():
    report = make_report(a_program(total_tokens=None), Topology.parse("v5e:16x16"), compiled())
    assert report.days is report.chip_hours is None
    assert report.line(price=2.0)["dollars"] is None
    cut = make_report(
        a_program(tokens=0, flops=0.0, total_tokens=None), Topology.parse("v5e:16x16"), compiled()
    )
    assert cut.tokens_per_second is None
    assert cut.line(None)["mfu"] == 0.0


def test_what_does_not_fit_is_said_with_the_compilers_figures():
    refusal = OutOfMemory(20e9, 16e9, ((8e9, "jit(step)/head/dot"),))
    report = make_report(a_program(), Topology.parse("v5e:16x16"), refusal)
    assert not report.fits
    assert (report.hbm, report.available, report.peak, report.step) == (20e9, 16e9, None, None)
    assert report.memory == {"parameters": 680, "batch": 64}
    line = json.loads(json.dumps(report.line(1.0)))
    assert line["fits"] is False
    assert line["step_s"] is line["mfu"] is line["tokens_per_s_chip"] is line["dollars"] is None
    assert line["largest"] == [[8e9, "jit(step)/head/dot"]]


def test_a_report_survives_json():
    report = make_report(a_program(), Topology.parse("v5e:16x16"), compiled())
    again = Report(**json.loads(json.dumps(report.to_json())))
    assert again.line(1.0) == json.loads(json.dumps(report.line(1.0)))


def test_flops_by_hand():
    """6 a parameter and token; of attention 12 L H C times half of the row (PaLM, appendix B)."""
    context = 512
    attention = 12 * 3 * 4 * 16 * context / 2
    assert 3 * SHAPE.flops_per_token(context) == 6 * PARAMETERS + attention
    assert np.isclose(SHAPE.parameters, PARAMETERS)
