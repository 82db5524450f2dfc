import dataclasses
import sys
from concurrent import futures

import jax
import numpy as np
import pytest

from distill_jax import data, losses, teachers
from distill_jax.artifacts import InputError

from .known import VOCAB, ListCorpus, make_corpus, make_teacher

CONFIG = teachers.WriteConfig(batch_rows=4, rows_per_shard=4)


def write(directory, teacher, corpus, scheme, **options):
    teachers.write_stores(
        {"": directory},
        {"": scheme},
        teacher.model,
        corpus,
        config=CONFIG,
        hidden_states=teacher.hidden_states,
        **options,
    )
    return teachers.open_store(directory)


@pytest.fixture(scope="module")
def corpus():
    return make_corpus(9)


@pytest.fixture(scope="module")
def stores(tmp_path_factory, corpus):
    root = tmp_path_factory.mktemp("stores")
    return {
        "small": write(root / "small", make_teacher(1), corpus, teachers.TopK(k=4)),
        "large": write(root / "large", make_teacher(2), corpus, teachers.RandomSampling(draws=20)),
    }


def assert_own_teacher(record):
    """The likeliest id at every token of the record is that of the teacher's table."""
    real = record["segment_ids"] > 0
    likeliest = make_teacher(1).table[record["tokens"]].argmax(axis=-1)
    np.testing.assert_array_equal(record["targets"]["small"]["ids"][real, 0], likeliest[real])


def test_every_row_gets_its_own_targets(corpus, stores):
    source = teachers.join(corpus, stores, vocab_size=VOCAB, temperature=1.0)
    assert len(source) == 9
    for index in range(9):
        record = source[index]
        assert record["row_id"] == index
        assert record["targets"].keys() == {"small", "large"}
        assert_own_teacher(record)


def test_rows_of_another_corpus_are_found_by_content(corpus, stores):
    some = ListCorpus([corpus.rows[i] for i in (7, 2, 2, 5)], fingerprint="corpus-b")
    source = teachers.join(some, stores)
    for index in range(4):
        assert_own_teacher(source[index])


def test_batches_carry_targets_to_the_losses(corpus, stores):
    source = teachers.join(corpus, stores)
    batch = next(data.batches(source, batch_rows=4, seed=0))
    small = teachers.to_targets(stores["small"].scheme, batch["targets"]["small"])
    assert small.ids.shape == small.log_probs.shape == (4, 12, 4)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch["targets"])
    logits = make_teacher(1).table[batch["tokens"].reshape(-1)]
    where = batch["segment_ids"].reshape(-1) > 0
    own = losses.forward_kl(logits, stores["small"].to_targets(flat["small"]))
    np.testing.assert_allclose(own[where], 0, atol=5e-4)
    assert np.isfinite(own).all()
    other = losses.forward_kl(logits, stores["large"].to_targets(flat["large"]))
    assert np.isfinite(other).all()
    assert other[where].min() > 0.5


def altered(store, **changes):
    """The store with another identity."""
    other = object.__new__(teachers.Store)
    other.__dict__.update(store.__dict__)
    identity = dataclasses.replace(store.identity, **changes)
    other.manifest = dataclasses.replace(store.manifest, identity=identity)
    return other


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "x"}, "has tokenizer x, the corpus has tokenizer-a"),
        ({"sequence_length": 24}, "has sequence length 24, the corpus has 12"),
        ({"vocab_size": 301}, "has vocabulary 301, the student has 300"),
        ({"temperature": 2.0}, "has temperature 2.0, the loss has 1.0"),
    ],
)
def test_a_store_that_does_not_fit_is_refused(corpus, stores, changes, message):
    wrong = {"large": altered(stores["large"], **changes)}
    with pytest.raises(InputError, match=f"teacher large: .*large {message}"):
        teachers.join(corpus, wrong, vocab_size=VOCAB, temperature={"large": 1.0})


def test_teachers_of_different_vocabularies_are_refused(corpus, stores):
    wrong = stores | {"large": altered(stores["large"], vocab_size=301)}
    with pytest.raises(InputError, match="small 300, large 301"):
        teachers.join(corpus, wrong)


def test_a_temperature_for_an_unknown_teacher_is_refused(corpus, stores):
    with pytest.raises(InputError, match="temperature: 'larg' is no teacher"):
        teachers.join(corpus, stores, temperature={"larg": 2.0})


def test_missing_rows_are_refused_before_the_first(corpus, stores):
    more = ListCorpus(corpus.rows[:3] + make_corpus(2, seed=9).rows, fingerprint="corpus-b")
    expected = (
        rf"small \(written for corpus corpus-a\) lacks 2 of 5 rows of corpus corpus-b, "
        rf"the first row 3 \(key {more[3]['key']}\)"
    )
    with pytest.raises(InputError, match=expected):
        teachers.join(more, stores)


def test_other_rows_under_the_same_fingerprint_are_refused_before_the_first(corpus, stores):
    with pytest.raises(InputError, match=r"small: has row \w+ where the corpus has .*\(row 0\)"):
        teachers.join(ListCorpus(corpus.rows[::-1]), stores)
    for rows in (corpus.rows[:8], [*corpus.rows, corpus.rows[0]]):
        expected = rf"small has 9 rows of corpus corpus-a, the corpus has {len(rows)}"
        with pytest.raises(InputError, match=expected):
            teachers.join(ListCorpus(rows), stores)


def test_a_row_that_was_not_compared_is_refused_when_it_is_read(corpus, stores, monkeypatch):
    monkeypatch.setattr(sys.modules["distill_jax.teachers.join"], "_COMPARED", 2)
    swapped = [corpus.rows[i] for i in (0, 1, 2, 4, 3, 5, 6, 7, 8)]
    source = teachers.join(ListCorpus(swapped), stores)
    assert_own_teacher(source[2])
    with pytest.raises(InputError, match=r"where the corpus has .*\(row 3\)"):
        source[3]


def by_row(batches):
    """{row: leaves} of each of several batches taken together."""
    rows = {}
    for batch in batches:
        for place, row in enumerate(batch["row_id"].tolist()):
            assert row not in rows
            rows[row] = jax.tree.map(lambda leaf, place=place: leaf[place], batch)
    return rows


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_read_the_batches_of_one(corpus, stores, hosts):
    """Tokens, labels and every teacher's targets, whatever Grain reads ahead in its threads."""
    source = teachers.join(corpus, stores)
    arguments = {"batch_rows": 4, "seed": 11, "epochs": 3}
    alone = list(data.batches(source, **arguments))
    shares = [
        list(data.batches(source, **arguments, process_index=host, process_count=hosts))
        for host in range(hosts)
    ]
    assert [len(share) for share in shares] == [len(alone)] * hosts == [6] * hosts
    for number, batch in enumerate(alone):
        expected, found = by_row([batch]), by_row(share[number] for share in shares)
        assert found.keys() == expected.keys()
        for row, leaves in expected.items():
            jax.tree.map(np.testing.assert_array_equal, found[row], leaves)


def test_a_host_that_starts_again_reads_on(corpus, stores):
    arguments = {"batch_rows": 4, "seed": 11, "epochs": 3, "process_index": 1, "process_count": 2}
    source = teachers.join(corpus, stores)
    undisturbed = list(data.batches(source, **arguments))
    iterator = data.batches(source, **arguments)
    for _ in range(3):
        next(iterator)
    again = data.batches(teachers.join(corpus, stores), **arguments)
    again.set_state(iterator.get_state())
    for found, expected in zip(again, undisturbed[3:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_rows_read_by_many_threads_in_any_order_are_those_read_alone(corpus, stores):
    source = teachers.join(corpus, stores)
    alone = [source[row] for row in range(9)]
    order = np.random.default_rng(0).integers(0, 9, 300).tolist()
    with futures.ThreadPoolExecutor(8) as pool:
        for row, found in zip(order, pool.map(source.__getitem__, order)):
            np.testing.assert_equal(found, alone[row])


def test_from_texts_to_batches(tmp_path):
    """With the corpus and the batches of training themselves."""
    texts = [f"Passage {n}: {n * n} is the square of {n}, and {n + 1} follows." for n in range(80)]
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(f'{{"passage": "{text}"}}\n' for text in texts))
    tokenizer = data.train_tokenizer(texts, VOCAB)
    config = data.CorpusConfig(
        source=str(source), out_of_domain=None, sequence_length=12, held_out_fraction=0.2
    )
    data.build_corpus(config, tokenizer, tmp_path / "corpus")
    train = data.open_corpus(tmp_path / "corpus", "train")
    held_out = data.open_corpus(tmp_path / "corpus", "held_out")
    teacher = make_teacher(1, vocab=tokenizer.vocab_size)
    store = write(tmp_path / "store", teacher, train, teachers.TopK(k=4))
    with pytest.raises(InputError, match=f"lacks .* of {len(held_out)} rows"):
        teachers.join(held_out, {"small": store})
    source = teachers.join(train, {"small": store}, vocab_size=tokenizer.vocab_size)
    for batch in data.batches(source, batch_rows=4, seed=3, epochs=1):
        real = batch["segment_ids"] > 0
        likeliest = teacher.table[batch["tokens"]].argmax(axis=-1)
        np.testing.assert_array_equal(batch["targets"]["small"]["ids"][real][:, 0], likeliest[real])
