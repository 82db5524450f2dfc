import zlib

import numpy as np
import pytest

from distill_jax.teachers import codec
from distill_jax.teachers.codec import Column

COLUMNS = (
    Column(name="length", dtype="uint8"),
    Column(name="entropy", dtype="float16"),
    Column(name="ids", dtype="uint24", counted_by="length"),
    Column(name="log_probs", dtype="float16", counted_by="length", fill=-np.inf),
)


def test_the_bytes_are_these():
    columns = (Column(name="n", dtype="uint8"), Column(name="ids", dtype="uint24", counted_by="n"))
    arrays = {"n": np.array([2, 0, 1]), "ids": np.array([[1, 0x123456], [9, 9], [255, 9]])}
    body = bytes([2, 0, 1, 1, 0, 0, 0x56, 0x34, 0x12, 255, 0, 0])
    checksum = zlib.crc32(b"key" + body).to_bytes(4, "little")
    assert codec.encode(columns, arrays, "key") == checksum + body


@pytest.mark.parametrize(
    "largest", [255, 256, 65_535, 65_536, 128_255, 2**24 - 1, 2**24, 2**31 - 1]
)
def test_integers_survive_at_the_edges_of_their_dtype(largest):
    dtype = codec.unsigned(largest)
    columns = (Column(name="n", dtype="uint8"), Column(name="ids", dtype=dtype, counted_by="n"))
    ids = np.array([[largest, 0, largest // 2]])
    record = codec.encode(columns, {"n": np.array([3]), "ids": ids}, "")
    decoded = codec.decode(columns, record, "", tokens=1, width=3)
    np.testing.assert_array_equal(decoded["ids"], ids)
    smaller = {"uint8": 1, "uint16": 2, "uint24": 3, "uint32": 4}[dtype]
    assert largest < 256**smaller
    assert smaller == 1 or largest >= 256 ** (smaller - 1)


def ragged(seed=0, tokens=20, width=6):
    rng = np.random.default_rng(seed)
    return {
        "length": rng.integers(0, width + 1, tokens),
        "entropy": rng.random(tokens).astype(np.float32),
        "ids": rng.integers(0, 1 << 24, (tokens, width)),
        "log_probs": -rng.random((tokens, width)).astype(np.float32),
    }


def test_round_trip_pads_to_the_width_asked():
    arrays = ragged()
    record = codec.encode(COLUMNS, arrays, "row")
    decoded = codec.decode(COLUMNS, record, "row", tokens=20, width=9)
    assert decoded["ids"].shape == decoded["log_probs"].shape == (20, 9)
    for token, length in enumerate(arrays["length"]):
        np.testing.assert_array_equal(decoded["ids"][token, :length], arrays["ids"][token, :length])
        expected = arrays["log_probs"][token, :length].astype(np.float16)
        np.testing.assert_array_equal(decoded["log_probs"][token, :length], expected)
        assert (decoded["ids"][token, length:] == 0).all()
        assert (decoded["log_probs"][token, length:] == -np.inf).all()
    total = int(arrays["length"].sum())
    sizes = codec.column_bytes(COLUMNS, decoded)
    assert sizes == {
        "checksum": 4, "length": 20, "entropy": 40, "ids": 3 * total, "log_probs": 2 * total,
    }  # fmt: skip
    assert sum(sizes.values()) == len(record)


def test_a_log_probability_below_float16_is_impossible():
    arrays = {"x": np.array([-1e9, -3.0], np.float32)}
    columns = (Column(name="x", dtype="float16"),)
    record = codec.encode(columns, arrays, "")
    assert codec.decode(columns, record, "", tokens=2, width=0)["x"].tolist() == [-np.inf, -3.0]


def test_every_flipped_bit_is_noticed():
    record = codec.encode(COLUMNS, ragged(tokens=3), "row")
    for bit in range(8 * len(record)):
        damaged = bytearray(record)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(codec.CorruptRecord, match="checksum"):
            codec.decode(COLUMNS, bytes(damaged), "row", tokens=3, width=6)


def test_the_record_of_another_row_is_noticed():
    record = codec.encode(COLUMNS, ragged(), "row")
    with pytest.raises(codec.CorruptRecord, match="checksum"):
        codec.decode(COLUMNS, record, "other row", tokens=20, width=6)


@pytest.mark.parametrize(
    ("tokens", "width", "message"),
    [
        (19, 6, "bytes too many|ends inside"),
        (21, 6, "ends inside|bytes too many"),
        (20, 2, "the store 2"),
    ],
)
def test_a_record_of_another_shape_is_noticed(tokens, width, message):
    record = codec.encode(COLUMNS, ragged(), "row")
    with pytest.raises(codec.CorruptRecord, match=message):
        codec.decode(COLUMNS, record, "row", tokens=tokens, width=width)


@pytest.mark.parametrize("size", [0, 3, 4, 10])
def test_a_short_record_is_noticed(size):
    record = codec.encode(COLUMNS, ragged(), "row")
    with pytest.raises(codec.CorruptRecord):
        codec.decode(COLUMNS, record[:size], "row", tokens=20, width=6)
