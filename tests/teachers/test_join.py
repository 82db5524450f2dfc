import dataclasses

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


def test_a_corpus_that_lies_about_its_rows_is_refused_at_the_row(corpus, stores):
    source = teachers.join(ListCorpus(corpus.rows[::-1]), stores)
    with pytest.raises(InputError, match=r"where the corpus has .*\(row 0\)"):
        source[0]


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
