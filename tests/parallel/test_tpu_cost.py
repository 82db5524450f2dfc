import types

import pytest

from distill_jax.parallel import topology
from distill_jax.parallel.tpu_cost import estimate

from .hlo_texts import CHIP, FOUR, GATHERED, MIB, cycles, module


def test_estimated_cycles_add_up_outside_fusions():
    inner = f"""%fused (a: f32[8]) -> f32[8] {{
  %a = f32[8]{{0:T(256)}} parameter(0)
  ROOT %n = f32[8]{{0:T(256)}} negate(%a), {cycles(777)}
}}"""
    text = module(
        [
            "%p = f32[8]{0:T(256)} parameter(0)",
            "%f = (f32[8]{0:T(256)}, f32[8]{0:T(8,128)(2,1)S(1)}) fusion(%p), calls=%fused, "
            + cycles(3000),
            f"ROOT %c = f32[8]{{0:T(256)}} convert(%p), {cycles(1000)}",
        ],
        inner,
    )
    cost = estimate(text, CHIP)
    assert cost.compute_seconds == pytest.approx(4000 / 1e9)
    assert cost.seconds == cost.compute_seconds
    assert cost.unpriced == {}
    assert any("1 GHz" in line for line in cost.assumptions)


# A loop of 3 turns around one of 5 - 1 turns, whose bound lies in the carried tuple.
INNER = f"""%inner_condition (c: (s32[], s32[], f32[8])) -> pred[] {{
  %c = (s32[]{{:T(128)}}, s32[]{{:T(128)}}, f32[8]{{0:T(256)}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%c), index=0
  %n = s32[]{{:T(128)}} get-tuple-element(%c), index=1
  ROOT %lt = pred[]{{:T(512)}} compare(%i, %n), direction=LT
}}

%inner_body (c.1: (s32[], s32[], f32[8])) -> (s32[], s32[], f32[8]) {{
  %c.1 = (s32[]{{:T(128)}}, s32[]{{:T(128)}}, f32[8]{{0:T(256)}}) parameter(0)
  %x = f32[8]{{0:T(256)}} get-tuple-element(%c.1), index=2
  %y = f32[8]{{0:T(256)}} multiply(%x, %x), {cycles(100)}
  ROOT %t = (s32[], /*index=1*/s32[], f32[8]{{0:T(256)}}) tuple(%i, %n, %y)
}}

%condition (d: (s32[], f32[8])) -> pred[] {{
  %three = s32[]{{:T(128)}} constant(3)
  %d = (s32[]{{:T(128)}}, f32[8]{{0:T(256)}}) parameter(0)
  %j = s32[]{{:T(128)}} get-tuple-element(%d), index=0
  ROOT %lt.1 = pred[]{{:T(512)}} compare(%j, %three), direction=LT
}}

%body (e: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %e = (s32[]{{:T(128)}}, f32[8]{{0:T(256)}}) parameter(0)
  %one = s32[]{{:T(128)}} constant(1)
  %five = s32[]{{:T(128)}} constant(5)
  %five.1 = s32[]{{:T(128)}} copy(%five)
  %z = f32[8]{{0:T(256)}} get-tuple-element(%e), index=1
  %w = f32[8]{{0:T(256)}} add(%z, %z), {cycles(10)}
  %start = (s32[]{{:T(128)}}, s32[]{{:T(128)}}, f32[8]{{0:T(256)}}) tuple(%one, %five.1, %w)
  ROOT %while.2 = (s32[], s32[], f32[8]) while(%start), condition=%inner_condition, body=%inner_body
}}"""
LOOP = [
    "%zero = s32[]{:T(128)} constant(0)",
    "%p = f32[8]{0:T(256)} parameter(0)",
    "%tuple = (s32[]{:T(128)}, f32[8]{0:T(256)}) tuple(%zero, %p)",
    "ROOT %while = (s32[], f32[8]) while(%tuple), condition=%condition, body=%body",
]


def test_nested_loops_multiply():
    cost = estimate(module(LOOP, INNER), CHIP)
    assert cost.compute_seconds == pytest.approx(3 * (10 + 4 * 100) / 1e9)


def test_a_loop_that_cannot_be_read_is_refused():
    text = module(LOOP, INNER.replace("compare(%j, %three), direction=LT", "not(%j)"))
    with pytest.raises(ValueError, match="how often the loop while turns"):
        estimate(text, CHIP)
    # Unless whoever asks says how often such a loop turns.
    cost = estimate(text, CHIP, turns=2)
    assert cost.compute_seconds == pytest.approx(2 * (10 + 4 * 100) / 1e9)


def test_calls_and_branches_are_entered():
    text = module(
        [
            "%p = f32[8]{0:T(256)} parameter(0)",
            "%a = f32[8]{0:T(256)} call(%p), to_apply=%left",
            "ROOT %b = f32[8] conditional(%q, %p, %p), branch_computations={%left, %right}",
        ],
        f"%left (l: f32[8]) -> f32[8] {{\n  ROOT %k = f32[8] negate(%l), {cycles(7)}\n}}",
        f"%right (r: f32[8]) -> f32[8] {{\n  ROOT %m = f32[8] negate(%r), {cycles(1000)}\n}}",
    )
    assert estimate(text, CHIP).compute_seconds == pytest.approx((7 + 7 + 1000) / 1e9)


@pytest.mark.parametrize(
    ("line", "seconds"),
    [
        # a ring of 4 sends 3/4 of what all hold together, both ways at once
        (f"f32[1024,1024]{{1,0:T(8,128)}} all-gather(%p), {FOUR}", 0.75 * MIB / 100e9),
        (f"f32[1024,1024]{{1,0}} all-reduce(%p), {FOUR}, to_apply=%add", 2 * 0.75 * MIB / 100e9),
        (f"f32[256,1024]{{1,0}} reduce-scatter(%p), {FOUR}, to_apply=%add", 0.75 * MIB / 100e9),
        (f"f32[1024,1024]{{1,0}} all-to-all(%p), {FOUR}", 0.25 * 0.75 * MIB / 100e9),
        (f"(f32[1024,1024], f32[1024,1024]) all-gather(%p, %q), {FOUR}", 2 * 0.75 * MIB / 100e9),
        # 2 devices are no ring, 32 lie along two axes
        ("f32[1024,1024] all-gather(%p), replica_groups={{0,1},{2,3}}", 0.5 * MIB / 50e9),
        ("f32[1024,1024] all-gather(%p), replica_groups=[2,32]<=[64]", 31 / 32 * MIB / 200e9),
        (
            "f32[1024,1024] all-gather(%p), replica_groups=mesh['a'=2,'b'=4], "
            "device_ids=([4,2]T(1,0)) {'b'}, dimensions={0}",
            0.75 * MIB / 100e9,
        ),
        (
            "f32[1024,1024] all-gather(%p), replica_groups=mesh['a'=8,'b'=4] {'a','b'}",
            31 / 32 * MIB / 200e9,
        ),
        ("bf16[1024,1024] collective-permute(%p), source_target_pairs={{0,1}}", MIB / 2 / 50e9),
    ],
)
def test_collectives(line, seconds):
    text = module(["%p = f32[256,1024] parameter(0)", f"ROOT %g = {line}, channel_id=1"])
    cost = estimate(text, CHIP)
    assert cost.collective_seconds == pytest.approx(seconds)
    assert cost.seconds == cost.collective_seconds


def test_a_sum_of_which_each_keeps_a_share_takes_one_pass():
    inner = f"""%all-reduce-scatter (input: f32[1024,1024]) -> f32[256,1024] {{
  %input = f32[1024,1024]{{1,0}} parameter(0)
  %r = f32[1024,1024]{{1,0}} all-reduce(%input), {FOUR}, to_apply=%add
  ROOT %s = f32[256,1024]{{1,0}} dynamic-slice(%r, %k, %zero), dynamic_slice_sizes={{256,1024}}
}}"""
    call = "ROOT %fusion = f32[256,1024]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter"
    cost = estimate(module(["%p = f32[1024,1024] parameter(0)", call], inner), CHIP)
    assert cost.collective_seconds == pytest.approx(0.75 * MIB / 100e9)


def test_links_bound_the_time():
    """Three collectives in flight at once are hidden behind the same work, but share the links."""
    body = ["%p = f32[256,1024] parameter(0)"]
    for channel in (1, 2, 3):
        call = f"all-gather-start(%p), {FOUR}, channel_id={channel}"
        body.append(f"%s.{channel} = (f32[256,1024], f32[1024,1024]) {call}")
    body.append(f"%work = f32[8] negate(%p), {cycles(40_000)}")
    body += [f"%d.{n} = f32[1024,1024] all-gather-done(%s.{n})" for n in (1, 2, 3)]
    cost = estimate(module(body), CHIP)
    assert cost.collective_seconds == 0.0
    assert cost.seconds == pytest.approx(3 * GATHERED)


def test_scopes_share_the_time_and_the_heaviest_are_named():
    def line(name, scope, count):
        return f'%{name} = f32[8] negate(%p), metadata={{op_name="{scope}"}}, {cycles(count)}'

    gather = f'f32[1024,1024] all-gather(%p), {FOUR}, metadata={{op_name="jit(f)/jvp(mlp)/dot"}}'
    text = module(
        [
            line("a", "jit(f)/transpose(jvp(attention))/while/body/mul", 100),
            line("b", "jit(f)/attention/mlp/add", 20),  # the innermost one's
            line("c", "jit(f)/mlp_of_another_name/add", 3),
            f"ROOT %g = {gather}",
        ]
    )
    cost = estimate(text, CHIP, parts=("attention", "mlp"), heaviest=2)
    assert cost.parts == pytest.approx(
        {"attention": 100e-9, "mlp": 20e-9 + GATHERED, "": 3e-9}, rel=1e-6
    )
    assert [one.name for one in cost.heaviest] == ["g", "a"]
    assert cost.heaviest[0].detail == "f32[1024,1024] over 4"
    assert sum(cost.parts.values()) == pytest.approx(cost.seconds)


def test_what_has_no_estimate_is_listed():
    text = module(
        [
            "%p = f32[1024,1024]{1,0:T(8,128)} parameter(0)",
            "%v = f32[1024,1024]{1,0:T(8,128)S(1)} copy-done(%p)",
            "%r = f32[1048576]{0:T(1024)} reshape(%p)",
            "%r.1 = f32[1048576]{0:T(1024)} reshape(%v)",
            "%one = s32[]{:T(128)} add(%i, %i)",
            "ROOT %scatter_fusion.3 = f32[1048576]{0:T(1024)} fusion(%r), calls=%none",
        ]
    )
    cost = estimate(text, CHIP)
    assert cost.unpriced == {"reshape": 2, "scatter": 1}
    assert cost.unpriced_seconds == pytest.approx((2 + 1) * MIB / 1e12)  # %v lies in VMEM
    assert cost.seconds == 0.0


def kernel(config):
    target = 'custom_call_target="tpu_custom_call"'
    return module([f"ROOT %k = f32[8]{{0}} custom-call(%p), {target}, backend_config={{{config}}}"])


def test_kernels():
    stated = estimate(kernel('"cost_estimate":{"flops":"5000000000000"}'), CHIP)
    assert stated.seconds == stated.kernel_seconds == pytest.approx(5e12 / 50e12)
    assert estimate(kernel(""), CHIP).unpriced == {"kernel": 1}


@pytest.mark.parametrize(("phase", "products"), [("fwd", 2), ("dq", 3), ("dkv", 4)])
@pytest.mark.parametrize(("channels", "reached"), [(64, 30e12), (128, 50e12)])
@pytest.mark.parametrize("shared", [1, 4])
def test_splash_attention_says_nothing_of_its_work(phase, products, channels, reached, shared):
    """A product of a causal row is half of 2 T S C operations for every head of every row.

    S is T, or the times of all devices that share the row.
    """
    keys = 4096 * shared
    result = f"2,8,{keys}" if phase == "dkv" else "2,32,4096"
    scope = f"jit(step)/attention/vmap(splash_mha_{phase}_segmented_no_residuals)/pallas_call"
    target = 'custom_call_target="tpu_custom_call"'
    text = module(
        [
            "%m = s8[4,4]{1,0} parameter(0)",
            f"%q = bf16[2,32,{channels},4096]{{3,2,1,0:T(8,128)(2,1)}} parameter(1)",
            f"%k = bf16[2,8,{channels},{keys}]{{3,2,1,0:T(8,128)(2,1)}} parameter(2)",
            f"ROOT %s = bf16[{result},{channels}]{{3,2,1,0}} custom-call(%m, %q, %k), {target}, "
            f'metadata={{op_name="{scope}"}}',
        ]
    )
    cost = estimate(text, CHIP, parts=("attention",))
    flops = products * 2 * 32 * 4096 * keys * channels
    assert cost.kernel_seconds == pytest.approx(flops / reached)
    assert cost.parts == {"attention": cost.seconds}


def test_kernels_are_work_behind_which_collectives_hide():
    start = f"all-gather-start(%p), {FOUR}, channel_id=9"
    target = 'custom_call_target="tpu_custom_call"'
    stated = 'backend_config={"cost_estimate":{"flops":"1000000000"}}'  # 20 us
    text = module(
        [
            "%p = f32[256,1024] parameter(0)",
            f"%s = (f32[256,1024], f32[1024,1024]) {start}",
            f"%k = f32[8]{{0}} custom-call(%p), {target}, {stated}",
            "ROOT %d = f32[1024,1024] all-gather-done(%s)",
        ]
    )
    cost = estimate(text, CHIP)
    assert cost.kernel_seconds == pytest.approx(20e-6)
    assert cost.collective_seconds == pytest.approx(GATHERED - 20e-6)


def test_newlines_and_braces_in_metadata():
    odd = f'%n = f32[8] negate(%p), metadata={{op_name="a\n{{b\n}}"}}, {cycles(5)}\n  ROOT %while ='
    text = module(LOOP, INNER).replace("ROOT %while =", odd)
    assert estimate(text, CHIP).compute_seconds == pytest.approx((3 * 410 + 5) / 1e9)


def test_memory_of_an_executable():
    stats = types.SimpleNamespace(
        argument_size_in_bytes=50,
        temp_size_in_bytes=30,
        output_size_in_bytes=20,
        alias_size_in_bytes=15,
        peak_memory_in_bytes=77,
    )
    compiled = types.SimpleNamespace(
        as_text=lambda: module(LOOP, INNER), memory_analysis=lambda: stats
    )
    cost = estimate(compiled, CHIP)
    assert (cost.hbm_bytes, cost.peak_bytes) == (85, 77)
    assert estimate(module(LOOP, INNER), CHIP).hbm_bytes is None


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        estimate("module @jit_f {}", CHIP)


@pytest.mark.parametrize("name", sorted(topology.CHIPS))
def test_published_figures_agree(name):
    """The matrix units' width times the clock gives the published peak."""
    width = {"v5e": 4 * 128**2, "v5p": 8 * 128**2, "v6e": 4 * 256**2}[name]
    chip = topology.CHIPS[name]
    assert chip.flops == pytest.approx(2 * width * chip.clock, rel=0.01)
