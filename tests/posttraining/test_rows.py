import itertools

import numpy as np
import pytest

from distill_jax import data, parallel
from distill_jax.artifacts import InputError
from distill_jax.posttraining import Example, pack, with_replay
from distill_jax.posttraining.rows import filled_batches


def random_examples(source: np.random.Generator, count: int, longest: int) -> list[Example]:
    """Examples of distinct tokens, so that each can be found again in the rows."""
    examples, token = [], 1
    for length in source.integers(2, longest + 1, count).tolist():
        where = source.random(length) < 0.5
        where[-1] = True
        examples.append(Example(list(range(token, token + length)), where.tolist()))
        token += length
    return examples


@pytest.mark.parametrize("seed", range(5))
def test_every_trained_token_is_predicted_once_from_its_own_example(seed):
    examples = random_examples(np.random.default_rng(seed), 30, 16)
    rows = pack(examples, 16)
    predicted = [
        (int(token), int(label), int(segment))
        for row in rows
        for token, label, segment, where in zip(
            row["tokens"], row["labels"], row["segment_ids"], row["where"], strict=True
        )
        if where
    ]
    expected = [
        (before, after)
        for tokens, where in examples
        for before, after, trained in zip(tokens, tokens[1:], where[1:], strict=False)
        if trained
    ]
    assert sorted(pair[:2] for pair in predicted) == sorted(expected)
    assert all(segment > 0 for *_, segment in predicted)
    # Each example lies whole in one row, as one segment; first fit leaves no room for it before.
    kept = [row["tokens"][row["segment_ids"] == s].tolist() for row in rows for s in range(1, 17)]
    assert sorted(tokens for tokens in kept if tokens) == sorted(e.tokens for e in examples)
    used = [int((row["segment_ids"] > 0).sum()) for row in rows]
    assert all(a + b > 16 for a, b in itertools.pairwise(used))


def test_rows_agree_with_the_labels_of_the_corpus():
    examples = [Example([5, 6, 7], [True] * 3), Example([8, 9], [True] * 2)]
    (row,) = pack(examples, 8, pad_id=3)
    labels, where = data.next_token_labels(row["tokens"], row["segment_ids"])
    np.testing.assert_array_equal(row["where"], where)
    np.testing.assert_array_equal(row["labels"][where], labels[where])
    assert row["tokens"].tolist() == [5, 6, 7, 8, 9, 3, 3, 3]
    assert row["segment_ids"].tolist() == [1, 1, 1, 2, 2, 0, 0, 0]
    assert row["where"].tolist() == [True, True, False, True, False, False, False, False]


def test_rows_become_batches():
    rows = pack(random_examples(np.random.default_rng(0), 12, 8), 8)
    batch = next(data.batches(rows, batch_rows=2, seed=0, shuffle=False))
    for name, values in batch.items():
        np.testing.assert_array_equal(values, np.stack([row[name] for row in rows[:2]]))


def test_what_does_not_fit_or_teaches_nothing_is_refused():
    short = Example([1, 2], [False, True])
    with pytest.raises(InputError, match="example 1: 9 tokens do not fit in 8"):
        pack([short, Example([1] * 9, [True] * 9)], 8)
    with pytest.raises(InputError, match="example 1: no token to learn"):
        pack([short, Example([1, 2], [True, False])], 8)


def test_replayed_text_is_learnt_whole_and_makes_up_its_share():
    rows = pack([Example([1, 2, 3], [False, False, True])] * 6, 4)
    text = {
        "tokens": np.array([5, 6, 7, 8], np.int32),
        "segment_ids": np.array([1, 1, 2, 2], np.int32),
        "key": "left behind",
    }
    mixed = with_replay(rows, [text] * 9, 0.25)
    assert len(mixed) == 8
    assert all(new is old for new, old in zip(mixed, rows, strict=False))
    assert mixed[6].keys() == rows[0].keys()
    np.testing.assert_array_equal(mixed[7]["where"], [True, False, True, False])
    np.testing.assert_array_equal(mixed[7]["labels"], [6, 0, 8, 0])
    assert with_replay(rows, [text] * 9, 0.0) == rows
    assert len(with_replay(rows[:1], [text] * 9, 0.25)) == 2  # a share is never rounded to nothing
    assert len(with_replay(rows, [text], 0.9)) == 7  # there is no more text than that
    with pytest.raises(InputError, match="rows of text have 4 tokens, the others 8"):
        with_replay(pack([Example([1, 2], [False, True])], 8), [text], 0.5)


@pytest.mark.parametrize(("count", "shape"), [(0, None), (3, 8), (11, 16), (40, 24)])
def test_on_a_mesh_no_device_gets_more_rows_than_it_must(count, shape):
    rows = pack([Example([1, number], [False, True]) for number in range(count)], 2)
    found = list(filled_batches(rows, 3, parallel.make_mesh()))
    assert sum(len(part) for part, _ in found) == count
    assert {batch["tokens"].shape[0] for _, batch in found} == ({shape} if shape else set())
    for part, batch in found:
        np.testing.assert_array_equal(
            batch["tokens"][: len(part)], np.stack([row["tokens"] for row in part])
        )
