import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax.data import next_token_labels, pack, packing, row_key

examples = settings(derandomize=True, deadline=None, max_examples=200)
documents = st.lists(st.lists(st.integers(1, 10**6), max_size=30), max_size=12)


@pytest.mark.slow
@given(documents=documents, length=st.integers(2, 12))
@examples
def test_segments_joined_are_the_documents_joined(documents, length):
    rows = list(pack(documents, length, pad_id=0))
    kept = [tokens[segment_ids > 0] for tokens, segment_ids in rows]
    assert [int(t) for row in kept for t in row] == [t for doc in documents for t in doc]
    assert all(row.shape == (length,) for pair in rows for row in pair)
    assert all((segment_ids > 0).all() for _, segment_ids in rows[:-1])  # only the last is padded


@pytest.mark.slow
@given(documents=documents, length=st.integers(2, 12))
@examples
def test_segments_count_from_one_and_none_holds_two_documents(documents, length):
    owners = iter([number for number, doc in enumerate(documents) for _ in doc])
    for tokens, segment_ids in pack(documents, length, pad_id=7):
        real = segment_ids[segment_ids > 0]
        assert np.array_equal(segment_ids[len(real) :], np.zeros(length - len(real)))
        assert (tokens[len(real) :] == 7).all()
        assert real[0] == 1
        assert set(np.diff(real)) <= {0, 1}
        row_owners = [next(owners) for _ in real]
        changes = np.diff(row_owners) > 0
        assert np.array_equal(changes, np.diff(real) == 1)


@pytest.mark.slow
@given(
    parts=st.lists(st.tuples(st.sampled_from("ab"), documents), max_size=6),
    length=st.integers(2, 40),
    order=st.randoms(use_true_random=False),
)
@examples
def test_parts_that_are_cut_alone_give_the_rows_of_all(parts, length, order):
    named = [((split, number), documents) for number, (split, documents) in enumerate(parts)]
    order.shuffle(named)  # whoever is first
    starts = packing.starts((name, sum(map(len, documents))) for name, documents in named)
    rows = {}
    for name, documents in named:
        for row, offset, pieces in packing.cut(documents, length, start=starts[name]):
            rows.setdefault((name[0], row), []).append((offset, pieces))
    for split in "ab":
        together = [document for of, documents in parts for document in documents if of == split]
        expected = list(pack(together, length, pad_id=9))
        assert sorted(row for of, row in rows if of == split) == list(range(len(expected)))
        for row, pair in enumerate(expected):
            laid = packing.lay(packing.join(rows[split, row]), length, pad_id=9)
            np.testing.assert_array_equal(laid, pair)


def test_a_long_document_goes_on_in_the_next_row():
    rows = list(pack([[1, 2], [3, 4, 5, 6, 7]], 4, pad_id=9))
    assert [tokens.tolist() for tokens, _ in rows] == [[1, 2, 3, 4], [5, 6, 7, 9]]
    assert [segments.tolist() for _, segments in rows] == [[1, 1, 2, 2], [1, 1, 1, 0]]
    assert rows[0][0].dtype == rows[0][1].dtype == np.int32


def test_key_changes_with_any_token_and_any_segment_id():
    rng = np.random.default_rng(0)
    tokens, segment_ids = rng.integers(0, 200_000, (2, 16), np.int32)
    keys = {row_key(tokens, segment_ids), row_key(segment_ids, tokens)}
    for row in (0, 1):
        for position in range(16):
            for change in (1, 1 << 16):  # a hash of uint16 ids would miss the second
                changed = np.stack([tokens, segment_ids])
                changed[row, position] += change
                keys.add(row_key(*changed))
    assert len(keys) == 2 + 2 * 16 * 2
    assert row_key(tokens.astype(np.int64), segment_ids) in keys  # content, not its type


@given(
    rows=st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
@examples
def test_labels_are_the_next_token_of_the_same_segment(rows, seed):
    segment_ids = np.array(rows, np.int32)
    tokens = np.random.default_rng(seed).integers(0, 50, segment_ids.shape, np.int32)
    labels, where = next_token_labels(tokens, segment_ids)
    assert (labels.dtype, where.dtype) == (np.int32, np.bool_)
    for row in range(len(rows)):
        for t in range(6):
            has_next = t < 5 and rows[row][t] != 0 and rows[row][t + 1] == rows[row][t]
            assert where[row, t] == has_next
            assert labels[row, t] == (tokens[row, t + 1] if has_next else 0)


@pytest.mark.parametrize("length", [1, 2])
def test_labels_of_the_shortest_rows(length):
    labels, where = next_token_labels(np.array([5, 6])[:length], np.array([1, 1])[:length])
    assert labels.tolist() == [6, 0][2 - length :]
    assert where.tolist() == [True, False][2 - length :]
