import collections
import itertools

import numpy as np
import pytest

from distill_jax import data
from distill_jax.artifacts import InputError


def make_records(count, length=6):
    rng = np.random.default_rng(0)
    return [
        {
            "row_id": i,
            "key": f"key {i}",
            "tokens": rng.integers(0, 99, length, np.int32),
            "segment_ids": np.ones(length, np.int32),
            "targets": {"8b": {"ids": np.full((length, 3), i, np.int32)}},
        }
        for i in range(count)
    ]


def row_ids(iterator, count=None):
    return [batch["row_id"].tolist() for batch in itertools.islice(iterator, count)]


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        if isinstance(value, dict):
            assert_same(value, right[name])
        else:
            np.testing.assert_array_equal(value, right[name])


def test_every_row_once_an_epoch_and_each_epoch_in_its_own_order():
    found = row_ids(data.batches(make_records(24), batch_rows=4, seed=3, epochs=3))
    epochs = [joined(found[e : e + 6]) for e in (0, 6, 12)]
    assert len(found) == 18
    for epoch in epochs:
        assert sorted(epoch) == list(range(24))
    assert len({tuple(epoch) for epoch in [*epochs, range(24)]}) == 4


def test_the_last_partial_batch_is_left_out_of_each_epoch():
    found = row_ids(data.batches(make_records(10), batch_rows=4, seed=3, epochs=50))
    assert len(found) == 100
    seen = collections.Counter(row for batch in found for row in batch)
    assert sorted(seen) == list(range(10))  # not always the same two rows
    for epoch in range(50):
        assert len(set(joined(found[2 * epoch : 2 * epoch + 2]))) == 8


def test_unshuffled_batches_keep_the_order():
    found = row_ids(data.batches(make_records(5), batch_rows=2, seed=0, shuffle=False, epochs=2))
    assert found == [[0, 1], [2, 3], [0, 1], [2, 3]]


def test_without_epochs_there_is_no_end():
    assert len(row_ids(data.batches(make_records(3), batch_rows=3, seed=0), count=50)) == 50


def test_the_order_depends_on_the_seed_alone():
    records = make_records(32)
    first, same, other = (
        row_ids(data.batches(records, batch_rows=4, seed=seed, epochs=2)) for seed in (1, 1, 2)
    )
    assert first == same
    assert first != other


@pytest.mark.parametrize("taken", [0, 1, 5, 8, 11])
def test_a_restored_iterator_goes_on_exactly(taken):
    def start():
        return data.batches(make_records(16), batch_rows=2, seed=5, epochs=2)

    undisturbed = list(start())
    iterator = start()
    for _ in range(taken):
        next(iterator)
    state = iterator.get_state()
    restored = start()
    restored.set_state(state)
    rest = list(restored)
    assert len(rest) == 16 - taken
    for left, right in zip(rest, undisturbed[taken:], strict=True):
        assert_same(left, right)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_rows_of_every_global_batch(processes):
    records = make_records(23)  # a process's own share of the rest would make one more batch
    arguments = {"batch_rows": 6, "seed": 9, "epochs": 2}
    alone = row_ids(data.batches(records, **arguments))
    shares = [
        row_ids(data.batches(records, **arguments, process_index=i, process_count=processes))
        for i in range(processes)
    ]
    assert len(alone) == 6
    for number, batch in enumerate(alone):
        together = [share[number] for share in shares]
        assert {len(part) for part in together} == {6 // processes}
        assert sorted(joined(together)) == sorted(batch)


def test_batches_hold_labels_and_all_but_strings():
    records = make_records(4)
    records[1]["segment_ids"] = np.array([1, 1, 2, 2, 0, 0], np.int32)
    batch = next(data.batches(records, batch_rows=4, seed=0, shuffle=False))
    assert set(batch) == {"row_id", "tokens", "segment_ids", "targets", "labels", "where"}
    tokens = np.stack([record["tokens"] for record in records])
    np.testing.assert_array_equal(batch["tokens"], tokens)
    np.testing.assert_array_equal(batch["where"][1], [True, False, True, False, False, False])
    np.testing.assert_array_equal(
        batch["labels"][1], tokens[1, [1, 0, 3, 0, 0, 0]] * batch["where"][1]
    )
    np.testing.assert_array_equal(batch["labels"][0, :5], tokens[0, 1:])
    assert batch["targets"]["8b"]["ids"].shape == (4, 6, 3)
    assert batch["targets"]["8b"]["ids"][2, 0, 0] == 2


def test_records_keep_the_labels_they_bring():
    records = make_records(2)
    for record in records:
        record["labels"] = np.arange(6, dtype=np.int32)
        record["where"] = np.arange(6) > 3
    batch = next(data.batches(records, batch_rows=2, seed=0))
    np.testing.assert_array_equal(batch["labels"], [np.arange(6)] * 2)
    np.testing.assert_array_equal(batch["where"], [np.arange(6) > 3] * 2)
    assert "labels" in records[0]
    assert "key" in records[0]  # the source is left as it was


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_rows": 5}, "batch_rows: 5 is more than the 4 rows there are"),
        ({"batch_rows": 0}, "batch_rows: 0 rows do not divide over 1 hosts"),
        ({"batch_rows": 3, "process_count": 2}, "batch_rows: 3 rows do not divide over 2 hosts"),
        ({"batch_rows": 2, "process_count": 2, "process_index": 2}, "process_index: 2 is not"),
    ],
)
def test_wrong_arguments_are_one_clear_line(arguments, message):
    with pytest.raises(InputError, match=message):
        data.batches(make_records(4), seed=0, **arguments)
