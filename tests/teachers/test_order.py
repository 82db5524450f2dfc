import collections

import numpy as np
import pytest

from distill_jax.artifacts import InputError
from distill_jax.teachers import order

from .known import make_corpus


def test_ids_are_counted_outside_padding():
    corpus = make_corpus(5)
    expected = collections.Counter(
        int(token)
        for tokens, segment_ids in corpus.rows
        for token, segment in zip(tokens, segment_ids)
        if segment > 0
    )
    counts = order.count_tokens(corpus, 300)
    assert {i: int(count) for i, count in enumerate(counts) if count} == expected
    ids = order.by_frequency(counts)
    assert ids.tolist() == sorted(range(300), key=lambda i: (-expected[i], i))
    data = order.counts_to_bytes(counts)
    np.testing.assert_array_equal(order.counts_from_bytes(data, 300), counts)
    with pytest.raises(InputError, match="has counts of 300 ids, the vocabulary 301"):
        order.counts_from_bytes(data, 301)
    with pytest.raises(InputError, match="not the counts of a vocabulary"):
        order.counts_from_bytes(data[:-1], 300)


def test_rows_of_a_large_corpus_are_sampled_evenly():
    assert order.sampled_rows(10, 4).tolist() == list(range(10))
    rows = order.sampled_rows(1_000_000, 1 << 20)
    assert len(rows) == 16
    assert (rows[0], rows[-1]) == (0, 999_999)
    assert np.ptp(np.diff(rows)) <= 1
    assert order.sampled_rows(3, 1 << 25).tolist() == [0]
