import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from distill_jax import data
from distill_jax.artifacts import InputError


@pytest.fixture(scope="module")
def sources(passages, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    repeated = [*passages, *passages[:30], "  " + passages[40] + "\n"]
    lines = [json.dumps({"passage": text}) for text in repeated]
    (folder / "in.jsonl").write_text("\n".join(lines))
    (folder / "out").mkdir()
    (folder / "out" / "a.txt").write_text("another kind of text " * 40)
    (folder / "out" / "b.txt").write_text(passages[3])  # in the first source already
    return folder


def make_config(sources, **changes):
    defaults = {
        "source": str(sources / "in.jsonl"),
        "out_of_domain": str(sources / "out"),
        "sequence_length": 32,
        "held_out_fraction": 0.2,
    }
    return data.CorpusConfig(**defaults | changes)


@pytest.fixture(scope="module")
def built(sources, tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpus")
    figures = data.build_corpus(make_config(sources), tokenizer, directory)
    return directory, figures


def rows_of(corpus):
    return [corpus[i] for i in range(len(corpus))]


def texts_of(corpus, tokenizer):
    """The passages, recovered: each opens with the beginning-of-text token."""
    ids = np.concatenate([row["tokens"][row["segment_ids"] > 0] for row in rows_of(corpus)])
    starts = np.flatnonzero(ids == tokenizer.bos_id)
    return [tokenizer.decode(part[1:]) for part in np.split(ids, starts[1:])]


def files_of(directory):
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_every_distinct_passage_is_in_one_split_whole(built, tokenizer, passages):
    directory, figures = built
    train, held_out, other = (
        texts_of(data.open_corpus(directory, split), tokenizer) for split in data.SPLITS
    )
    assert sorted(train + held_out) == sorted(passages)
    assert not set(train) & set(held_out)
    assert 20 <= len(held_out) <= 60  # a fifth of 200, within 3.5 deviations
    assert train == [text for text in passages if text in set(train)]  # the source's order
    assert other == [("another kind of text " * 40).strip()]
    assert sum(figures[split]["tokens"] for split in ("train", "held_out")) == sum(
        len(ids) for ids in tokenizer.encode_batch(passages, bos=True)
    )


def test_rows_carry_their_place_and_the_key_of_their_content(built):
    directory, figures = built
    for split in data.SPLITS:
        corpus = data.open_corpus(directory, split)
        assert len(corpus) == figures[split]["rows"]
        for place, row in enumerate(rows_of(corpus)):
            assert row["row_id"] == place
            assert row["tokens"].shape == row["segment_ids"].shape == (32,)
            assert row["tokens"].dtype == row["segment_ids"].dtype == np.int32
            assert row["key"] == data.row_key(row["tokens"], row["segment_ids"])
        assert (row["tokens"][row["segment_ids"] == 0] == 2).all()  # the trained pad token


def test_a_corpus_is_a_sequence(built):
    corpus = data.open_corpus(built[0], "held_out")
    assert len(list(corpus)) == len(corpus)
    for index in (-1, len(corpus)):
        with pytest.raises(IndexError):
            corpus[index]


def test_the_dataset_is_plain_tfds(built):
    directory, figures = built
    builder = tfds.builder_from_directory(directory / "corpus" / "1.0.0")
    rows = builder.as_data_source(split="train")
    assert builder.info.splits["train"].num_examples == figures["train"]["rows"]
    np.testing.assert_array_equal(
        rows[1]["tokens"], data.open_corpus(directory, "train")[1]["tokens"]
    )
    assert "tensorflow" not in sys.modules


def test_caps_keep_the_first_rows(built, sources, tokenizer, tmp_path):
    figures = data.build_corpus(
        make_config(sources, train_rows=3, held_out_rows=2), tokenizer, tmp_path
    )
    assert [figures[split]["rows"] for split in ("train", "held_out")] == [3, 2]
    few, all_ = (data.open_corpus(place, "train") for place in (tmp_path, built[0]))
    assert [row["key"] for row in rows_of(few)] == [all_[i]["key"] for i in range(3)]
    assert few.fingerprint != all_.fingerprint


def test_end_of_text_closes_every_passage(sources, tokenizer, tmp_path):
    config = make_config(sources, end_of_text=True, out_of_domain=None)
    assert set(data.build_corpus(config, tokenizer, tmp_path)) == {"train", "held_out"}
    texts = texts_of(data.open_corpus(tmp_path, "train"), tokenizer)
    assert all(text.endswith("<|end_of_text|>") for text in texts)


def test_the_seed_draws_the_held_out_passages(built, sources, tokenizer, tmp_path):
    data.build_corpus(make_config(sources, seed=1), tokenizer, tmp_path)
    drawn = [
        set(texts_of(data.open_corpus(place, "held_out"), tokenizer))
        for place in (built[0], tmp_path)
    ]
    assert drawn[0] != drawn[1]


def run_build(config, tokenizer, folder, before=""):
    """Builds into `folder`/corpus in a process of its own, after the statements `before`."""
    tokenizer.save(folder / "tokenizer")
    script = f"""
{before}
from distill_jax import data
tokenizer = data.load_tokenizer({str(folder / "tokenizer")!r})
data.build_corpus(data.{config!r}, tokenizer, {str(folder / "corpus")!r})
"""
    return subprocess.run([sys.executable, "-c", script], check=False).returncode


def test_another_process_writes_the_same_bytes(built, sources, tokenizer, tmp_path):
    assert run_build(make_config(sources), tokenizer, tmp_path) == 0
    assert files_of(tmp_path / "corpus") == files_of(built[0])


def test_building_again_changes_nothing(built, sources, tokenizer, tmp_path):
    figures = data.build_corpus(make_config(sources), tokenizer, tmp_path)
    assert figures == built[1]
    before = (tmp_path / "corpus.json").stat().st_mtime_ns
    assert data.build_corpus(make_config(sources), tokenizer, tmp_path) == figures
    assert (tmp_path / "corpus.json").stat().st_mtime_ns == before  # done is done


DIE_AT_A_ROW = """
import os, signal
from distill_jax.data import packing
row_key, calls = packing.row_key, []
def row_key_then_die(*row):
    calls.append(row)
    if len(calls) == {count}:
        os.kill(os.getpid(), signal.SIGKILL)
    return row_key(*row)
packing.row_key = row_key_then_die
"""


def test_a_build_after_a_kill_gives_the_same_bytes(built, sources, tokenizer, tmp_path):
    dying = DIE_AT_A_ROW.format(count=built[1]["train"]["rows"] + 2)  # in the second split
    assert run_build(make_config(sources), tokenizer, tmp_path, dying) == -signal.SIGKILL
    place = tmp_path / "corpus"
    assert files_of(place)  # it died on the way
    with pytest.raises(InputError, match=r"corpus.json: no such file"):
        data.open_corpus(place, "train")
    data.build_corpus(make_config(sources), tokenizer, place)
    assert files_of(place) == files_of(built[0])


def test_fingerprints_follow_content_and_split(built):
    fingerprints = {figures["fingerprint"] for figures in built[1].values()}
    assert len(fingerprints) == 3
    corpus = data.open_corpus(built[0], "train")
    keys = "".join(row["key"] for row in rows_of(corpus))
    assert corpus.fingerprint == hashlib.sha256(b"train" + keys.encode()).hexdigest()[:16]


def test_another_corpus_is_not_overwritten(built, sources, tokenizer):
    before = files_of(built[0])
    with pytest.raises(
        InputError, match=r"holds another corpus \(config.sequence_length: 32 -> 64"
    ):
        data.build_corpus(make_config(sources, sequence_length=64), tokenizer, built[0])
    assert files_of(built[0]) == before


def test_another_vocabulary_is_refused(built, sources, tokenizer):
    other = data.train_tokenizer(["some other text"], 300)
    with pytest.raises(InputError, match=f"tokenizer {tokenizer.fingerprint}, not with"):
        data.open_corpus(built[0], "train", tokenizer=other)
    with pytest.raises(InputError, match="tokenizer_fingerprint"):
        data.build_corpus(make_config(sources), other, built[0])
    corpus = data.open_corpus(built[0], "train", tokenizer=tokenizer)
    assert corpus.tokenizer_fingerprint == tokenizer.fingerprint
    assert corpus.sequence_length == 32


@pytest.mark.parametrize("length", [0, 100, 1 << 16])
def test_a_row_of_a_file_cut_short_is_refused(built, tmp_path, length):
    copy = shutil.copytree(built[0], tmp_path / "copy")
    (file,) = copy.rglob("corpus-train.array_record*")
    os.truncate(file, length)
    assert len(data.open_corpus(copy, "held_out")[0]["tokens"]) == 32
    with pytest.raises(InputError, match=f"{copy}: row 3 of train is damaged"):
        data.open_corpus(copy, "train")[3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "not a JSON object"),
        ("[" * 100_000, "not valid JSON"),
        ('{"format": 1, "config": {}}', "has no splits, tokenizer_fingerprint"),
        ('{"format": 2}', "format 2 is not 1"),
    ],
)
def test_a_wrong_manifest_is_refused(tmp_path, text, message):
    (tmp_path / "corpus.json").write_text(text)
    with pytest.raises(InputError, match=rf"corpus\.json: {message}"):
        data.open_corpus(tmp_path, "train")


def test_wrong_splits_and_places_are_refused(built, tmp_path):
    with pytest.raises(InputError, match="no split 'test'; it has held_out, out_of_domain, train"):
        data.open_corpus(built[0], "test")
    with pytest.raises(InputError, match=r"corpus.json: no such file"):
        data.open_corpus(tmp_path, "train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 1}, "sequence_length: 1 is less than 2"),
        ({"held_out_fraction": 1.0}, "held_out_fraction: 1.0 is not within 0 and 1"),
        ({"train_rows": 0}, "train_rows: 0 is less than 1"),
    ],
)
def test_wrong_configurations_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        data.CorpusConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"field": "text"}, r"in.jsonl: line 1: no text in the field 'text'"),
        ({"source": "/absent/in.jsonl"}, "/absent/in.jsonl: no such file"),
        (
            {"held_out_fraction": 1e-9},
            r"in.jsonl: too few passages \(201 in all\), none .* held_out",
        ),
    ],
)
def test_wrong_sources_leave_nothing_behind(sources, tokenizer, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        data.build_corpus(make_config(sources, **changes), tokenizer, tmp_path)
    assert files_of(tmp_path) == {}


def test_a_corpus_is_made_without_jax(built, sources, tokenizer, tmp_path):
    absent = "import sys; sys.modules.update(dict.fromkeys(['jax', 'flax', 'grain', 'orbax']))"
    assert run_build(make_config(sources), tokenizer, tmp_path, before=absent) == 0
    assert files_of(tmp_path / "corpus") == files_of(built[0])


def test_batches_of_a_corpus(built):
    corpus = data.open_corpus(built[0], "train")
    iterator = data.batches(corpus, batch_rows=len(corpus), seed=0, epochs=1)
    batch = next(iterator)
    assert sorted(batch["row_id"]) == list(range(len(corpus)))
    where = data.next_token_labels(batch["tokens"], batch["segment_ids"])[1]
    np.testing.assert_array_equal(batch["where"], where)
