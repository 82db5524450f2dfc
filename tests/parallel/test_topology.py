import math
import re
import types

import jax
import numpy as np
import pytest

from distill_jax import parallel
from distill_jax.artifacts import InputError
from distill_jax.parallel import Topology, ahead_of_time


@pytest.mark.parametrize(
    ("text", "sizes", "chips"),
    [
        ("v5e:16x16", (16, 16), 256),
        ("v5e:1x1", (1, 1), 1),
        ("v5p:4x4x8", (4, 4, 8), 128),
        ("v6e:2x4", (2, 4), 8),
    ],
)
def test_slices_are_read(text, sizes, chips):
    topology = Topology.parse(text)
    assert (topology.sizes, topology.chips, str(topology)) == (sizes, chips, text)
    assert topology.chip is parallel.CHIPS[text[:3]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5e", "write chip and sizes, such as v5e:16x16"),
        ("v5e:16x", "write chip and sizes"),
        ("v5e:-4x4", "write chip and sizes"),
        ("v9z:4x4", "chip 'v9z' is none of v5e, v5p, v6e"),
        ("v5e:4x4x4", "slices of v5e have 2 axes"),
        ("v5p:4x4", "slices of v5p have 3 axes"),
        ("v5e:3x5", "sizes of v5e are 1, 2 or multiples of 4, at most 16x16"),
        ("v5e:0x4", "sizes of v5e"),
        ("v5e:16x32", "at most 16x16"),
    ],
)
def test_other_slices_are_refused_in_one_line(text, message):
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        Topology.parse(text)
    assert "\n" not in str(caught.value)
    assert text in str(caught.value)


def test_larger_slices_double_the_chips_until_there_are_none():
    topology = Topology.parse("v5e:4x4")
    found = []
    while topology is not None:
        found.append(topology)
        topology = topology.larger()
    assert list(map(str, found)) == ["v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16"]
    assert str(Topology.parse("v5p:4x4x8").larger()) == "v5p:4x8x8"


@pytest.mark.parametrize(
    ("kind", "name", "tokens"),
    [("TPU v5 lite", "v5e", 963), ("TPU v5p", "v5p", 665), ("TPU v6 lite", "v6e", 2240)],
)
def test_from_the_least_chunk_on_products_last_longer_than_memory(kind, name, tokens):
    device = types.SimpleNamespace(platform="tpu", device_kind=kind)
    mesh = types.SimpleNamespace(devices=np.array([device], dtype=object))
    assert parallel.least_chunk(mesh) == tokens
    chip = parallel.CHIPS[name]
    assert 2 * tokens / chip.flops >= 8 / chip.memory_rate > 2 * (tokens - 1) / chip.flops


def test_the_least_chunk_of_other_devices_is_unknown():
    alone = parallel.make_mesh(parallel.MeshConfig(fsdp=1), jax.devices()[:1])
    assert parallel.least_chunk(alone) == parallel.least_chunk(None) == 0


def test_a_mesh_that_does_not_divide_is_refused_before_anything_is_made():
    devices = [object()] * 256
    with pytest.raises(
        InputError, match=r"data=3, fsdp=-1, sequence=1, tensor=1\) does not arrange 256"
    ):
        parallel.make_mesh(parallel.MeshConfig(data=3), devices)


def test_without_the_compiler_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("distill_jax.parallel.topology.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'jax\[tpu\]'") as caught:
        Topology.parse("v5e:4x4").devices()
    assert "\n" not in str(caught.value)


# As the compiler words them; the second form lists what is largest.
TEMPORARIES = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(40.25G) exceeds available HBM (15.75G)."
)
REPORT = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space \
hbm. Used 16.42G of 15.75G hbm. Exceeded hbm capacity by 683.43M. Memory usage report:

Total hbm usage >= 16.67G:
    reserved        258.00M
    program          16.42G

  Largest program allocations in hbm:

  1. Size: 8.00G
     Operator: op_type="dot_general" op_name="jit(step)/jvp(head)/nd,dv->nv/dot_general"
     Shape: f32[16384,128256]{1,0:T(8,128)}
     Unpadded size: 7.83G
     ==========================

  2. Size: 512.5M
     Shape: bf16[2048,128256]{1,0}
     Allocation type: HLO temp
     ==========================
"""


def test_refusals_are_read():
    refusal = ahead_of_time.parse_refusal(TEMPORARIES)
    assert refusal.needed == pytest.approx(40.25 * 2**30)
    assert refusal.available == pytest.approx(15.75 * 2**30)
    assert refusal.largest == ()
    assert "\n" not in str(refusal)

    refusal = ahead_of_time.parse_refusal(REPORT)
    assert refusal.needed == pytest.approx(16.42 * 2**30)
    assert refusal.available == pytest.approx(15.75 * 2**30)
    assert refusal.largest == (
        (8 * 2**30, "jit(step)/jvp(head)/nd,dv->nv/dot_general"),
        (512.5 * 2**20, ""),
    )


def test_other_errors_are_no_refusals():
    assert ahead_of_time.parse_refusal("INTERNAL: Mosaic failed to compile the kernel") is None


def test_what_a_chip_may_hold_is_less_than_it_has():
    """Published: 16, 95 and 32 GB."""
    for name, published in {"v5e": 16, "v5p": 96, "v6e": 32}.items():
        assert 0.95 * published < parallel.CHIPS[name].hbm / 2**30 < published
    assert math.isinf(parallel.Chip(clock=1, flops=1, memory_rate=1, link_rate=1, ring=4).hbm)
