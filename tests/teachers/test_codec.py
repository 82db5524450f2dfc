"""Records against a reader and a writer that go token by token, damage, and chance."""

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax.teachers.codec import Codec, Column, CorruptRecord

from . import reference_codec

EXACT = (
    Column(name="length"),
    Column(name="exact"),
    Column(name="entropy", steps=32),
    Column(name="label", steps=-32),
    Column(name="ids", counted_by="length"),
    Column(name="log_probs", counted_by="exact", steps=-64, mean_of_exp=True, fill=-np.inf),
)
COUNTED = (
    Column(name="length"),
    Column(name="ids", counted_by="length"),
    Column(name="draws", counted_by="length"),
)


def make_codec(columns=EXACT, *, tokens=20, vocab=1000, seed=0, teacher="t"):
    order = np.random.default_rng(seed).permutation(vocab).astype(np.int32)
    return Codec(columns=columns, order=order, tokens=tokens, teacher=teacher)


def random_arrays(tokens=20, width=6, vocab=1000, seed=0):
    """Arrays of either layout, their reals on the grid, with equal ids among them."""
    rng = np.random.default_rng(seed)
    length = rng.integers(0, width + 1, tokens)
    label = -rng.integers(0, 900, tokens) / 32
    label[:1] = -np.inf
    return {
        "length": length,
        "exact": rng.integers(0, length + 1),
        "entropy": rng.integers(0, 300, tokens) / 32,
        "label": label,
        "ids": rng.integers(0, vocab, (tokens, width)),
        "log_probs": -rng.integers(0, 300, (tokens, width)) / 64,
        "draws": rng.integers(1, 50, (tokens, width)),
    }


def assert_holds(codec, decoded, arrays, width):
    """`decoded` holds `arrays`, each run of ids in order of rank, and fills behind them."""
    for column in codec.columns:
        found, expected = decoded[column.name], arrays[column.name]
        assert found.dtype == (np.int32 if column.steps is None else np.float32)
        if column.counted_by is None:
            np.testing.assert_array_equal(found, expected)
            continue
        assert found.shape == (codec.tokens, width)
        for token, count in enumerate(arrays[column.counted_by]):
            slots = [s for run in reference_codec.in_order(codec, arrays, token) for s in run]
            kept = [expected[token][slot] for slot in slots if slot < count]
            np.testing.assert_array_equal(found[token, :count], kept)
            assert (found[token, count:] == column.fill).all()


@given(
    tokens=st.integers(0, 5),
    width=st.integers(1, 5),
    vocab=st.sampled_from([1, 2, 3, 50, 5000]),
    columns=st.sampled_from([EXACT, COUNTED]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_both_ways_against_one_token_at_a_time(tokens, width, vocab, columns, seed):
    codec = make_codec(columns, tokens=tokens, vocab=vocab, seed=seed)
    arrays = random_arrays(tokens, width, vocab, seed)
    record = codec.encode(arrays, "key")
    read = reference_codec.decode(codec, record, "key")
    written = codec.decode(reference_codec.encode(codec, arrays, "key"), "key", width + 1)
    assert_holds(codec, codec.decode(record, "key", width), arrays, width)
    assert_holds(codec, written, arrays, width + 1)
    for column in columns:
        for token in range(tokens):
            if column.counted_by is None:
                assert read[column.name][token] == arrays[column.name][token]
            else:
                count = arrays[column.counted_by][token]
                expected = written[column.name][token, :count].tolist()
                assert read[column.name][token] == expected


@pytest.mark.parametrize("columns", [EXACT, COUNTED])
def test_nothing_but_padding(columns):
    codec = make_codec(columns, tokens=800)
    arrays = {name: np.zeros_like(values) for name, values in random_arrays(800).items()}
    record = codec.encode(arrays, "key")
    assert_holds(codec, codec.decode(record, "key", 6), arrays, 6)
    # One to four numbers a token, each one bit.
    assert len(record) < 480


def test_the_rarest_ids_of_a_large_vocabulary():
    codec = make_codec(tokens=1, vocab=1 << 20)
    arrays = {name: values[:1] for name, values in random_arrays().items()}
    arrays |= {"length": np.array([3]), "exact": np.array([1]), "label": np.array([-7.0])}
    arrays["ids"] = codec.order[[[(1 << 20) - 1, 0, (1 << 20) - 1, 5, 5, 5]]]
    decoded = codec.decode(codec.encode(arrays, "key"), "key", 6)
    assert decoded["ids"][0, :3].tolist() == arrays["ids"][0, :3].tolist()
    assert_holds(codec, decoded, arrays, 6)


def test_parts_are_those_of_the_columns_alone():
    codec, arrays = make_codec(tokens=200), random_arrays(200)
    record = codec.encode(arrays, "key")
    parts = codec.part_bytes(record, "key", 6)
    assert list(parts) == [*(column.name for column in EXACT), "frame"]
    assert sum(parts.values()) == pytest.approx(len(record))
    assert 4 <= parts["frame"] < 10
    ones = {"length": np.ones(200, int), "exact": np.zeros(200, int)}
    without = codec.part_bytes(codec.encode(arrays | ones, "key"), "key", 6)
    # Equal lengths take a bit each, no values none, and entropies what they took.
    assert without["length"] == pytest.approx(200 / 8, abs=15)
    assert without["log_probs"] < 3
    assert without["entropy"] == pytest.approx(parts["entropy"], abs=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": np.full((20, 6), 1000)}, "ids: from 1000 to 1000, the vocabulary has 1000"),
        ({"ids": np.full((20, 6), -1)}, "ids: from -1"),
        ({"entropy": np.full(20, np.nan)}, "entropy: is NaN"),
    ],
)
def test_values_that_cannot_be_stored_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_codec().encode(random_arrays() | change, "key")
    with pytest.raises(ValueError, match="numbers from -3"):
        make_codec(COUNTED).encode(random_arrays() | {"draws": np.full((20, 6), -3)}, "key")


def test_every_flipped_bit_and_every_truncation_is_noticed():
    codec = make_codec()
    record = codec.encode(random_arrays(), "key")
    damaged = [record[:size] for size in range(len(record))] + [record + b"\0"]
    for bit in range(8 * len(record)):
        flipped = bytearray(record)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    for wrong in damaged:
        with pytest.raises(CorruptRecord, match="checksum"):
            codec.decode(wrong, "key", 6)


@given(st.binary(max_size=60))
def test_random_bytes_are_no_record(data):
    with pytest.raises(CorruptRecord):
        make_codec().decode(data, "key", 6)


def test_the_record_of_another_row_or_teacher_is_noticed():
    record = make_codec().encode(random_arrays(), "key")
    for codec, key in ((make_codec(), "yek"), (make_codec(teacher="u"), "key")):
        with pytest.raises(CorruptRecord, match="checksum"):
            codec.decode(record, key, 6)


def sealed(codec, packed, key="key"):
    checksum = zlib.crc32(f"{codec.teacher}:{key}".encode() + packed)
    return checksum.to_bytes(4, "little") + packed


@pytest.mark.parametrize("columns", [EXACT, COUNTED])
def test_damage_under_a_checksum_that_fits_gives_corrupt_record_or_arrays_in_range(columns):
    """As if somebody had meant it: no other exception, no id outside the vocabulary."""
    rng, refused = np.random.default_rng(0), 0
    codec = make_codec(columns, vocab=100)
    record = codec.encode(random_arrays(vocab=100), "key")
    for _ in range(3000):
        packed = bytearray(record[4:])
        for place in rng.integers(0, len(packed), rng.integers(1, 4)):
            packed[place] = rng.integers(256)
        try:
            decoded = codec.decode(sealed(codec, bytes(packed)), "key", 6)
        except CorruptRecord:
            refused += 1
        else:
            assert decoded["ids"].shape == (20, 6)
            assert 0 <= decoded["ids"].min() <= decoded["ids"].max() < 100
            assert 0 <= decoded["length"].min() <= decoded["length"].max() <= 6
    assert refused > 1000


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([3, 0, 0, 0, 1, 1], "ends inside column 'ids'"),
        ([1, 1, 0, 0], "ends inside column 'log_probs'|ends inside column 'ids'"),
        ([1, 1, 0, 0, 5, 5, 9], "1 numbers too many"),
        ([7, 0, 0, 0, *range(7)], "a token has 7 ids, the store 6"),
        ([1, 2, 0, 0, 5, 5, 5], "more in 'exact' than in 'length'"),
        ([2, 0, 0, 0, 90, 10], "ids reach 100, the end is 99"),
    ],
)
def test_numbers_that_are_no_row_are_noticed(numbers, message):
    codec = make_codec(tokens=1, vocab=100)
    with pytest.raises(CorruptRecord, match=message):
        codec.decode(sealed(codec, reference_codec.pack(numbers)), "key", 6)
    counted = make_codec(COUNTED, tokens=1)
    with pytest.raises(CorruptRecord, match="draws reach"):
        counted.decode(sealed(counted, reference_codec.pack([1, 5, 1 << 31])), "key", 6)


def test_a_layout_of_three_counts_is_refused():
    columns = (*EXACT, Column(name="x", counted_by="entropy"))
    with pytest.raises(ValueError, match="other columns by"):
        make_codec(columns).encode(random_arrays() | {"x": np.zeros((20, 6))}, "key")


KEYS = [f"row {number}" for number in range(400)]


def stored(column, values):
    """What becomes of one token's values in 400 rows, [400, K]."""
    columns = (Column(name="length"), Column(name="ids", counted_by="length"), column)
    codec = make_codec(columns, tokens=1)
    width = len(values)
    ids = codec.order[None, :width]
    arrays = {"length": np.array([width]), "ids": ids, column.name: np.array([values])}
    records = (codec.encode(arrays, key) for key in KEYS)
    return np.array(
        [codec.decode(record, key, width)[column.name][0] for record, key in zip(records, KEYS)],
        np.float64,
    )


@pytest.mark.parametrize("steps", [-8, -64])
def test_probabilities_are_right_on_average_and_within_a_step(steps):
    p = np.linspace(0.01, 1, 200)
    column = Column(name="x", counted_by="length", steps=steps, mean_of_exp=True)
    logs = stored(column, np.log(p))
    assert np.abs(logs - np.log(p)).max() < 1 / -steps + 1e-6
    np.testing.assert_allclose(logs * steps, np.round(logs * steps))
    found = np.exp(logs)
    noise = found.std(axis=0) / np.sqrt(len(KEYS))
    z = (found.mean(axis=0) - p)[noise > 1e-9] / noise[noise > 1e-9]
    assert len(z) > 190
    assert np.abs(z).max() < 5
    assert abs(z.mean()) < 4 / np.sqrt(len(z))
    assert 0.8 < z.std() < 1.2


def test_reals_are_right_on_average():
    values = np.linspace(0, 10, 200)
    found = stored(Column(name="x", counted_by="length", steps=4), values)
    assert np.abs(found - values).max() < 1 / 4
    noise = np.sqrt((values * 4 % 1) * (1 - values * 4 % 1) / 16 / len(KEYS))
    z = (found.mean(axis=0) - values)[noise > 1e-9] / noise[noise > 1e-9]
    assert np.abs(z).max() < 5
    assert abs(z.mean()) < 4 / np.sqrt(len(z))


def test_what_lies_on_the_grid_or_beyond_it():
    column = Column(name="x", counted_by="length", steps=-64, mean_of_exp=True)
    values = [0.0, -0.25, -3.0, -np.inf, -1e9, 1e-7]
    assert (stored(column, values) == [0, -0.25, -3, -np.inf, -np.inf, 0]).all()


def test_chance_is_the_row_s_and_the_teacher_s():
    arrays = random_arrays() | {"entropy": np.linspace(0.01, 3, 20)}
    entropies = [
        make_codec(teacher=teacher).decode(make_codec(teacher=teacher).encode(arrays, key), key, 6)[
            "entropy"
        ]
        for teacher, key in (("t", "a"), ("t", "a"), ("t", "b"), ("u", "a"))
    ]
    assert (entropies[0] == entropies[1]).all()
    assert (entropies[0] != entropies[2]).any()
    assert (entropies[0] != entropies[3]).any()
