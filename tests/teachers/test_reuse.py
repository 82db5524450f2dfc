"""Stores of a corpus that grew, made from the store of what it was."""

import pathlib

import numpy as np
import pytest

from distill_jax import teachers
from distill_jax.artifacts import InputError
from distill_jax.teachers import forward, writer
from distill_jax.teachers.codec import Codec

from . import reference_codec
from .known import VOCAB, ListCorpus, make_corpus, make_teacher
from .test_writer import CONFIG, SCHEMES, BrokenCorpus, Interrupted, contents, write

OLD = make_corpus(10)
# Old rows in another order among new ones, of ids that the old corpus knows as rare.
GROWN = ListCorpus(
    [*OLD.rows[7:], *make_corpus(3, seed=5, vocab=40).rows, *OLD.rows[:7]], fingerprint="corpus-b"
)


def stores(directory):
    return {name: [directory / name] for name in SCHEMES}


@pytest.fixture(scope="module")
def teacher():
    """Nearly certain of what follows in the first row, so much that a store says certain."""
    made, (tokens, _) = make_teacher(), OLD.rows[0]
    made.table[tokens[:-1], tokens[1:]] += 60
    return made


@pytest.fixture(scope="module")
def old(tmp_path_factory, teacher):
    directory = tmp_path_factory.mktemp("old")
    write(directory, teacher, OLD)
    return directory


@pytest.fixture(scope="module")
def fresh(tmp_path_factory, teacher):
    directory = tmp_path_factory.mktemp("fresh")
    write(directory, teacher, GROWN)
    return directory


@pytest.fixture
def asked(monkeypatch):
    """Rows that the teacher was asked about, by their tokens."""
    rows = []

    def ask(params, tokens_BT, segment_ids_BT, *rest, **options):
        real = np.asarray(segment_ids_BT).any(axis=1)
        rows.extend(row.tobytes() for row in np.asarray(tokens_BT)[real])
        return forward.ask_teacher(params, tokens_BT, segment_ids_BT, *rest, **options)

    monkeypatch.setattr(writer, "ask_teacher", ask)
    return rows


def test_a_grown_corpus_gets_a_fresh_store_s_bytes_and_the_teacher_sees_new_rows_alone(
    tmp_path, teacher, old, fresh, asked
):
    figures = write(tmp_path, teacher, GROWN, reuse=stores(old))
    assert contents(tmp_path) == contents(fresh)
    assert sorted(asked) == sorted(tokens.tobytes() for tokens, _ in GROWN.rows[3:6])
    assert {name: figures[name]["reused"] for name in SCHEMES} == dict.fromkeys(SCHEMES, 10)
    assert write(tmp_path, teacher, GROWN, reuse=stores(old)) == figures
    assert write(tmp_path, teacher, GROWN)["top"]["reused"] == 0


def test_a_part_of_a_corpus_needs_no_teacher(tmp_path, teacher, old, asked):
    part = ListCorpus(OLD.rows[2:9], fingerprint="corpus-c")
    write(tmp_path / "reused", teacher, part, reuse=stores(old))
    assert not asked
    write(tmp_path / "fresh", teacher, part)
    assert contents(tmp_path / "reused") == contents(tmp_path / "fresh")


def test_rows_come_from_several_stores_and_for_one_scheme_alone(
    tmp_path, teacher, old, fresh, asked
):
    write(tmp_path / "other", teacher, ListCorpus(GROWN.rows[4:8], fingerprint="corpus-c"))
    asked.clear()
    reuse = {"top": [old / "top", tmp_path / "other" / "top"], "random": [old / "random"]}
    figures = write(tmp_path / "new", teacher, GROWN, reuse=reuse)
    assert contents(tmp_path / "new") == contents(fresh)
    assert len(asked) == len(GROWN)
    found = {name: figures[name]["reused"] for name in SCHEMES}
    assert found == {"top": 12, "random": 10, "threshold": 0}


def test_an_interrupted_copy_goes_on(tmp_path, teacher, old, fresh):
    with pytest.raises(Interrupted):
        write(
            tmp_path,
            teacher,
            BrokenCorpus(GROWN.rows, fingerprint="corpus-b"),
            reuse=stores(old),
        )
    assert list(tmp_path.rglob("*array_record-00000*"))
    figures = write(tmp_path, teacher, GROWN, reuse=stores(old))
    assert contents(tmp_path) == contents(fresh)
    assert figures["threshold"]["reused"] == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": make_teacher(2)}, "teacher: "),
        ({"temperature": 2.0}, "temperature: 1.0 -> 2.0"),
        ({"schemes": {"top": teachers.TopK(k=6)}}, "scheme.k: 5 -> 6"),
        ({"tokenizer": "tokenizer-b"}, "tokenizer: 'tokenizer-a' -> 'tokenizer-b'"),
    ],
)
def test_a_store_of_other_targets_is_refused(tmp_path, teacher, old, options, message):
    corpus = ListCorpus(GROWN.rows, "corpus-b", options.get("tokenizer", "tokenizer-a"))
    own = options.get("teacher", teacher)
    with pytest.raises(InputError, match=f"reuse: .*top holds other targets .*{message}"):
        teachers.write_stores(
            {"top": tmp_path},
            options.get("schemes", {"top": SCHEMES["top"]}),
            own.model,
            corpus,
            config=CONFIG,
            temperature=options.get("temperature", 1.0),
            hidden_states=own.hidden_states,
            reuse={"top": [old / "top"]},
        )
    assert not list(pathlib.Path(tmp_path).iterdir())


@pytest.mark.parametrize("scheme", [*SCHEMES.values(), teachers.Threshold(ids=6)])
def test_decoded_values_are_encoded_as_the_first_ones_were(scheme):
    """In another order of ids, whichever way each value was rounded."""
    rng = np.random.default_rng(3)
    time, width = 12, scheme.width
    length = rng.integers(0, width + 1, time)
    arrays = {
        "length": length,
        "exact": rng.integers(0, length + 1),
        "entropy": rng.uniform(0, 6, time),
        "label_log_prob": -rng.exponential(2, time),
        "log_tail": np.where(rng.random(time) < 0.3, -np.inf, -rng.exponential(3, time)),
        "log_tau": -rng.exponential(3, time),
        "ids": np.argsort(rng.random((time, VOCAB)), axis=1)[:, :width],
        "log_probs": -rng.exponential(3, (time, width)),
        "counts": rng.integers(1, 30, (time, width)),
    }
    orders = [rng.permutation(VOCAB).astype(np.int32) for _ in range(2)]
    before, after = (
        Codec(columns=scheme.columns(VOCAB), order=order, tokens=time, teacher="t")
        for order in orders
    )
    record = before.encode(arrays, "key")
    again = after.encode(before.decode(record, "key", width), "key")
    assert again == after.encode(arrays, "key")
    assert values_of(after, again) == values_of(before, record)


def values_of(codec, record):
    """What the other reader finds: every token's values, and those of ids by id."""
    arrays = reference_codec.decode(codec, record, "key")
    ids = arrays["ids"]
    return {
        name: values
        if not isinstance(values[0], list)
        else [dict(zip(some, own)) for some, own in zip(ids, values)]
        for name, values in arrays.items()
    }
