"""What asynchronous collectives cost beside work: the time between their start and their end."""

import pytest

from distill_jax.parallel.tpu_cost import estimate

from .hlo_texts import CHIP, FOUR, GATHERED, MIB, cycles, module


@pytest.mark.parametrize("work", [1, 10_000, 100_000])  # the gathering takes 31457 cycles
def test_an_asynchronous_collective_is_waited_for_as_long_as_nothing_else_is_done(work):
    start = f"all-gather-start(%p), {FOUR}, channel_id=9"
    text = module(
        [
            "%p = f32[256,1024] parameter(0)",
            f"%before = f32[8] negate(%p), {cycles(500)}",
            f"%s = (f32[256,1024]{{1,0}}, f32[1024,1024]{{1,0}}) {start}",
            f"%between = f32[8] negate(%p), {cycles(work)}",
            "%d = f32[1024,1024]{1,0} all-gather-done(%s)",
            f"ROOT %after = f32[8] negate(%p), {cycles(700)}",
        ]
    )
    cost = estimate(text, CHIP)
    waits = max(GATHERED - work / 1e9, 0)
    assert cost.collective_seconds == pytest.approx(waits)
    assert cost.hidden_seconds == pytest.approx(GATHERED - waits)
    assert cost.seconds == pytest.approx((1200 + work) / 1e9 + waits)
    found = cost.collectives["all-gather"]
    assert (found.count, found.bytes) == (1, 0.75 * MIB)
    assert (found.seconds, found.waits) == pytest.approx((GATHERED, waits))
    assert cost.unpriced == {}


def riding(name):
    """A computation in which something stands beside a part of the gathering of channel 7."""
    layout = "{1,0:T(8,128)S(1)}" if "1" in name else "{1,0:T(8,128)}"
    return f"""%{name} (a: f32[256,1024]) -> f32[1024,1024] {{
  %a = f32[256,1024]{{1,0:T(8,128)}} parameter(0)
  %g = f32[1024,1024]{layout} all-gather(%a), {FOUR}, channel_id=7
  ROOT %c = f32[1024,1024]{{1,0}} negate(%g)
}}"""


def test_products_on_which_a_collective_rides_count_and_it_counts_once():
    kinds = "async_collective_fusion.1", "async_collective_fusion.2", "start", "done"
    text = module(
        [
            "%p = f32[256,1024] parameter(0)",
            "%async-collective-start.4 = f32[256,1024]{1,0} fusion(%p), calls=%start",
            f"%fusion.1 = f32[8] fusion(%p), calls=%async_collective_fusion.1, {cycles(4000)}",
            f"%fusion.2 = f32[8] fusion(%p), calls=%async_collective_fusion.2, {cycles(5000)}",
            "ROOT %async-collective-done.4 = f32[1024,1024]{1,0} fusion(%p), calls=%done",
        ],
        *map(riding, kinds),
    )
    cost = estimate(text, CHIP)
    assert cost.compute_seconds == pytest.approx(9000 / 1e9)
    assert cost.collective_seconds == pytest.approx(GATHERED - 9000 / 1e9)
    assert cost.hidden_seconds == pytest.approx(9000 / 1e9)
    assert cost.collectives["all-gather"].count == 1


def test_two_of_one_channel_and_shape_are_told_apart_by_their_chains():
    chained = riding("start").replace("channel_id=7", 'channel_id=1, chain_id="{0}"')
    body = ["%p = f32[256,1024] parameter(0)"]
    for chain in (1, 2):
        body += [
            f"%async-collective-start.{chain} = f32[256,1024] fusion(%p), calls=%start{chain}",
            f"%work.{chain} = f32[8] negate(%p), {cycles(10_000)}",
            f"%async-collective-done.{chain} = f32[8] fusion(%p), calls=%done{chain}",
        ]
    computations = [
        chained.replace("{0}", str(chain)).replace("%start", f"%{kind}{chain}")
        for kind in ("start", "done")
        for chain in (1, 2)
    ]
    cost = estimate(module(body, *computations), CHIP)
    assert cost.collectives["all-gather"].count == 2
    assert cost.collective_seconds == pytest.approx(2 * (GATHERED - 10_000 / 1e9))


@pytest.mark.parametrize("updated", [False, True])
def test_collectives_that_another_core_runs_are_waited_for_at_their_end(updated):
    """A reduce-scatter sends three quarters of its argument; each is a call of its own.

    Newer compilers start a call with nothing, and hand it its argument later: it sets off then.
    """
    called = f"""%called (a: f32[1024,1024]) -> f32[256,1024] {{
  %a = f32[1024,1024]{{1,0:T(8,128)}} parameter(0)
  ROOT %r = f32[256,1024]{{1,0:T(8,128)}} reduce-scatter(%a), {FOUR}, channel_id=1
}}, execution_thread="sparsecore"
"""
    core = 'async_execution_thread="sparsecore", to_apply=%called'
    made = "((f32[1024,1024]), f32[256,1024])"

    def start(n):
        if not updated:
            return [f"%{n}.call-start = {made} call-start(%p), {core}"]
        return [
            f"%{n}.call-start = ((), ()) call-start(), {core}",
            f"%before_{n} = f32[8] negate(%p), {cycles(5_000)}",
            f"%{n}.call-update = {made} call-update(%{n}.call-start, %p)",
        ]

    last = "update" if updated else "start"
    body = ["%p = f32[1024,1024] parameter(0)", *start("one")]
    body += [f"%work = f32[8] negate(%p), {cycles(10_000)}", *start("two")]
    body += [f"%{n} = f32[256,1024] call-done(%{n}.call-{last})" for n in ("one", "two")]
    cost = estimate(module(body, called), CHIP)
    found = cost.collectives["reduce-scatter"]
    assert (found.count, found.bytes) == (2, 2 * 0.75 * MIB)
    assert found.seconds == pytest.approx(2 * GATHERED)
    beside = 15_000 if updated else 10_000  # the first: the work, and what is before the second
    assert found.waits == pytest.approx(found.seconds - beside / 1e9)
    assert cost.compute_seconds == pytest.approx((20_000 if updated else 10_000) / 1e9)
