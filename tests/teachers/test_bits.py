import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_jax.teachers import bits

from . import reference_codec

NUMBERS = st.one_of(
    st.integers(0, 40),
    st.integers(0, 32).map(lambda e: max(2**e - 2, 0)),
    st.integers(0, bits.LARGEST),
)


def test_the_bytes_are_these():
    """By hand: 7 + 1 = 1000, 12 + 1 = 1101, 100 + 1 = 1100101 in binary leave 0, 1, 0101."""
    numbers = np.array([0, 1, 2, 3, 6, 7, 12, 100])
    packed, _ = bits.pack([numbers])
    inflate = zlib.decompressobj(wbits=-15)
    assert list(inflate.decompress(packed)) == [0, 4, 6, 8, 11, 12, 14, 26]
    assert inflate.unused_data == bytes([0b010110])


@given(st.lists(st.lists(NUMBERS, max_size=40), min_size=1, max_size=4))
def test_both_ways_against_one_number_at_a_time(kinds):
    everything = [number for kind in kinds for number in kind]
    packed, sizes = bits.pack([np.array(kind, np.int64) for kind in kinds])
    assert reference_codec.unpack(packed) == everything
    unpacked = bits.unpack(reference_codec.pack(everything), at_most=len(everything))
    assert unpacked.tolist() == everything
    assert len(sizes) == len(kinds)
    assert 0 <= len(packed) - sum(sizes) < 12


def test_a_hundred_thousand_numbers_of_every_size():
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 2 ** rng.integers(0, 32, 100_000))
    packed, _ = bits.pack([numbers[:30_000], numbers[30_000:]])
    np.testing.assert_array_equal(bits.unpack(packed, at_most=100_000), numbers)


def test_frequent_numbers_are_short():
    """A geometric law of entropy 2 bits takes little more than 2 bits a number."""
    numbers = np.random.default_rng(0).geometric(0.5, 100_000) - 1
    assert 8 * len(bits.pack([numbers])[0]) / len(numbers) < 2.1


@pytest.mark.parametrize("number", [-1, bits.LARGEST + 1])
def test_numbers_out_of_range_are_refused(number):
    with pytest.raises(ValueError, match=f"numbers from .*{number}"):
        bits.pack([np.array([0, number])])


def deflated(symbols):
    deflate = zlib.compressobj(wbits=-15)
    return deflate.compress(bytes(symbols)) + deflate.flush()


def test_a_small_record_cannot_ask_for_much_memory():
    bomb = deflated(bytes(50_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(bits.Unreadable, match="no end"):
            bits.unpack(bomb, at_most=1000)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (b"", "no end"),
        (b"\xff", "symbols are damaged"),
        (deflated([0] * 9), "no end"),
        (deflated([0] * 1_000_000), "no end"),
        (deflated([128]), "has a symbol 128"),
        (deflated([12]), "has 0 bytes of rests, its symbols want 1"),
        (deflated([12]) + bytes(2), "has 2 bytes of rests, its symbols want 1"),
    ],
)
def test_other_bytes_are_refused(packed, message):
    with pytest.raises(bits.Unreadable, match=message):
        bits.unpack(packed, at_most=8)
