import pytest

from distill_jax.parallel import liveness

HEADER = """HloModule jit_f, is_scheduled=true, input_output_alias={ {1}: (0, {}, may-alias) }, \
entry_computation_layout={(f32[1024])->(f32[1024], f32[1024])}

"""
KIB = 1024


def entry(*lines):
    return "\n  ".join(("ENTRY %main (p: f32[1024]) -> f32[1024] {", *lines)) + "\n}"


def alive(*parts):
    """KiB by name of what is alive at the peak."""
    found = liveness.at_peak(HEADER + "\n\n".join(parts))
    assert [array.bytes for array in found] == sorted((a.bytes for a in found), reverse=True)
    return {array.scope: array.bytes / KIB for array in found}


def test_arrays_live_from_their_maker_to_their_last_reader():
    text = entry(
        "%p = f32[1024]{0:T(1024)} parameter(0)",
        "%a = f32[2048]{0:T(1024)} pad(%p)",  # 8 KiB
        "%b = f32[4096]{0:T(1024)} pad(%a)",  # 16
        "%c = f32[1024]{0:T(1024)} slice(%a)",  # 4; a ends here
        "%d = f32[3072]{0:T(1024)} pad(%c)",  # 12
        "%e = f32[1024]{0:T(1024)} slice(%d)",
        "ROOT %r = (f32[1024]{0:T(1024)}, f32[1024]{0:T(1024)}) tuple(%e, %b)",
    )
    # The second result, b, lies in the memory of the argument; c and d are more than a and c.
    assert alive(text) == {"d": 12, "c": 4}


def test_what_lies_elsewhere_or_is_the_callers_does_not_count():
    text = entry(
        "%p = f32[1024]{0:T(1024)} parameter(0)",
        "%k = f32[4096]{0:T(1024)} constant({...})",
        "%v = f32[4096]{0:T(1024)S(1)} pad(%p)",
        "%x = f32[1024]{0:T(1024)} slice(%v)",
        "%y = f32[1024]{0:T(1024)} negate(%x)",
        "ROOT %r = (f32[1024]{0:T(1024)}, f32[1024]{0:T(1024)}) tuple(%y, %x)",
    )
    assert alive(text) == {"y": 4}


def test_padding_of_tiles_counts():
    sizes = {
        "f32[5]{0:T(1024)}": 4096,
        "f32[3,100]{1,0:T(8,128)}": 8 * 128 * 4,
        "bf16[3,100]{0,1:T(8,128)(2,1)}": 128 * 104 * 2,  # the first axis is the minor one
        "bf16[2,16,128]{2,1,0:T(8,128)(2,1)}": 2 * 16 * 128 * 2,
        "f32[3,100]{1,0}": 1200,
        "pred[]{:T(512)}": 1,
        "s32[7]{0:T(128)S(1)}": 0,
        "s32[7]{0:S(2)}": 0,
    }
    for type_, size in sizes.items():
        assert liveness.padded_bytes(type_) == size, type_


def test_results_that_share_memory_count_once():
    aliases = '"aliasing_operands":{"lists":[{"indices":["0","2"]}]}'
    text = entry(
        "%p = f32[1024]{0:T(1024)} parameter(0)",
        "%a = f32[4,1024]{1,0:T(8,128)} broadcast(%p)",  # 8 rows of tiles: 32 KiB
        "%bit = f32[4096]{0} bitcast(%a)",
        "%dus = f32[4,1024]{1,0:T(8,128)} dynamic-update-slice(%a, %p)",
        f"%f = f32[4,1024]{{1,0:T(8,128)}} fusion(%dus, %p), kind=kCustom, {aliases}",
        "%loop = f32[4,1024]{1,0:T(8,128)} fusion(%f), kind=kLoop, calls=%none",
        "%tuple = (f32[4,1024]{1,0:T(8,128)}, f32[1024]{0:T(1024)}) tuple(%loop, %p)",
        "%one = f32[4,1024]{1,0:T(8,128)} get-tuple-element(%tuple), index=0",
        "ROOT %r = f32[1024]{0:T(1024)} reduce(%one)",
    )
    assert alive(text) == {"a": 32, "r": 4}


def test_an_elementwise_result_does_not_take_the_place_of_what_is_still_read():
    text = entry(
        "%p = f32[1024]{0:T(1024)} parameter(0)",
        "%a = f32[2048]{0:T(1024)} pad(%p)",
        "%b = f32[2048]{0:T(1024)} fusion(%a), kind=kLoop, calls=%none",
        "ROOT %r = f32[1024]{0:T(1024)} reduce(%a, %b)",
    )
    assert alive(text) == {"a": 8, "b": 8, "r": 4}


def test_asynchronous_copies_hold_source_and_copy():
    text = entry(
        "%p = f32[1024]{0:T(1024)} parameter(0)",
        "%a = f32[2048]{0:T(1024)S(1)} pad(%p)",
        "%s = (f32[2048]{0:T(1024)}, f32[2048]{0:T(1024)S(1)}, u32[]{:S(2)}) copy-start(%a)",
        "%d = f32[2048]{0:T(1024)} copy-done(%s)",
        "%g = (f32[2048]{0:T(1024)}, f32[8192]{0:T(1024)}) all-gather-start(%d)",
        "%w = f32[1024]{0:T(1024)} negate(%p)",
        "%h = f32[8192]{0:T(1024)} all-gather-done(%g)",
        "ROOT %r = f32[1024]{0:T(1024)} reduce(%h, %w)",
    )
    assert alive(text) == {"s": 8, "g": 32, "w": 4}


def test_a_loop_needs_what_its_body_makes_beside_what_it_carries():
    body = """%body (c: (s32[], f32[2048])) -> (s32[], f32[2048]) {
  %c = (s32[]{:T(128)}, f32[2048]{0:T(1024)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  %x = f32[2048]{0:T(1024)} get-tuple-element(%c), index=1
  %big = f32[8192]{0:T(1024)} pad(%x), metadata={op_name="jit(f)/mlp/pad"}
  %y = f32[2048]{0:T(1024)} slice(%big)
  ROOT %t = (s32[]{:T(128)}, f32[2048]{0:T(1024)}) tuple(%i, %y)
}"""
    text = entry(
        "%p = f32[1024]{0:T(1024)} parameter(0)",
        "%z = s32[]{:T(128)} constant(0)",
        "%a = f32[2048]{0:T(1024)} pad(%p)",
        "%other = f32[4096]{0:T(1024)} pad(%p)",
        "%start = (s32[]{:T(128)}, f32[2048]{0:T(1024)}) tuple(%z, %a)",
        "%w = (s32[]{:T(128)}, f32[2048]{0:T(1024)}) while(%start), condition=%c, body=%body",
        "%i = s32[]{:T(128)} get-tuple-element(%w), index=0",
        "%out = f32[2048]{0:T(1024)} get-tuple-element(%w), index=1",
        "%sum = f32[1024]{0:T(1024)} reduce(%out, %other)",
        "%more = f32[8192]{0:T(1024)} pad(%sum, %i)",  # the carried array is not read any more
        "ROOT %r = f32[1024]{0:T(1024)} reduce(%more)",
    )
    assert alive(body, text) == {"a": 8, "other": 16, "jit(f)/mlp/pad": 32}


def test_of_a_tuple_only_what_is_read_lives_on():
    text = entry(
        "%p = f32[1024]{0:T(1024)} parameter(0)",
        "%a = f32[2048]{0:T(1024)} pad(%p)",
        "%b = f32[4096]{0:T(1024)} pad(%p)",
        "%t = (f32[2048]{0:T(1024)}, f32[4096]{0:T(1024)}) tuple(%a, %b)",
        "%x = f32[2048]{0:T(1024)} get-tuple-element(%t), index=0",
        "%c = f32[1024]{0:T(1024)} slice(%x)",
        "%big = f32[8192]{0:T(1024)} pad(%c)",
        "%y = f32[4096]{0:T(1024)} get-tuple-element(%t), index=1",
        "ROOT %r = f32[1024]{0:T(1024)} reduce(%big, %y)",
    )
    assert alive(text) == {"b": 16, "big": 32, "c": 4}


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        liveness.at_peak("module @jit_f {}")
