"""The whole way from a teacher to a store and back, with a teacher known by heart."""

import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distill_jax import models, teachers
from distill_jax.artifacts import InputError
from distill_jax.teachers import forward, writer
from distill_jax.teachers.shards import StoreWriter

from .known import VOCAB, ListCorpus, make_corpus, make_teacher

SCHEMES = {
    "top": teachers.TopK(k=5),
    "random": teachers.RandomSampling(draws=30),
    "threshold": teachers.Threshold(tau=0.04),
}
CONFIG = teachers.WriteConfig(batch_rows=4, rows_per_shard=4, chunk_tokens=16)


def write(directory, teacher, corpus, config=CONFIG, **options):
    directories = {name: epath.Path(directory) / name for name in SCHEMES}
    return teachers.write_stores(
        directories,
        SCHEMES,
        teacher.model,
        corpus,
        config=config,
        hidden_states=teacher.hidden_states,
        **options,
    )


def contents(directory):
    root = pathlib.Path(directory)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def rows_by_key(directory):
    store = teachers.open_store(directory)
    return {record["key"]: record["targets"] for record in (store[i] for i in range(len(store)))}


def assert_alike(directory, other):
    """The same ids and counts, and reals that are the same but for a few.

    Log-probabilities summed in another order differ in their last bit, which now and then
    decides to which neighbour on its grid one of them is rounded.
    """
    steps = {
        "entropy": 32,
        "label_log_prob": 32,
        "log_probs": 4096,
        "log_tail": 4096,
        "weights": 64,
    }
    same = []
    for name in SCHEMES:
        expected, found = rows_by_key(directory / name), rows_by_key(other / name)
        assert expected.keys() == found.keys()
        for key, arrays in expected.items():
            np.testing.assert_array_equal(found[key]["ids"], arrays["ids"])
            for kind in arrays.keys() - {"ids"}:
                close = {"rtol": 1e-6, "atol": 1.02 / steps[kind]}
                np.testing.assert_allclose(found[key][kind], arrays[kind], **close)
                same.append((found[key][kind] == arrays[kind]).ravel())
    assert np.concatenate(same).mean() > 0.995


@pytest.fixture(scope="module")
def teacher():
    return make_teacher()


@pytest.fixture(scope="module")
def corpus():
    return make_corpus(10)


@pytest.fixture(scope="module")
def written(tmp_path_factory, teacher, corpus):
    directory = tmp_path_factory.mktemp("stores")
    figures = write(directory, teacher, corpus)
    assert figures["top"]["tokens"] == sum(int((ids > 0).sum()) for _, ids in corpus.rows)
    assert figures["top"]["width"] == 5
    assert figures["random"]["rows"] == 10
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_of_every_token_against_float64(tmp_path, written, teacher, corpus, temperature):
    directory = written
    if temperature != 1:
        directory = tmp_path
        write(directory, teacher, corpus, temperature=temperature)
    store = teachers.open_store(directory / "top")
    following = [np.append(ids[1:] == ids[:-1], False) & (ids > 0) for _, ids in corpus.rows]
    assert store.manifest.labels == np.sum(following)
    for row, (tokens, segment_ids) in enumerate(corpus.rows):
        logits = teacher.table[tokens].astype(np.float64) / temperature
        log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        order = np.argsort(-logits, axis=-1)
        real, targets = segment_ids > 0, store[row]["targets"]
        np.testing.assert_array_equal(targets["ids"][real], order[real, :5])
        ranked = np.take_along_axis(log_probs, order, axis=-1)
        close = {"rtol": 1e-5, "atol": 1 / 4096}
        np.testing.assert_allclose(targets["log_probs"][real], ranked[real, :5], **close)
        tail = np.log(np.exp(ranked[:, 5:]).sum(axis=-1))
        np.testing.assert_allclose(targets["log_tail"][real], tail[real], **close)
        entropy = -(np.exp(log_probs) * log_probs).sum(axis=-1)
        np.testing.assert_allclose(targets["entropy"][real], entropy[real], atol=1 / 32)
        following = np.append(tokens[1:], 0)
        labelled = np.append(segment_ids[1:] == segment_ids[:-1], False) & real
        expected = np.where(labelled, log_probs[np.arange(len(tokens)), following], 0)
        np.testing.assert_allclose(targets["label_log_prob"], expected, atol=1 / 32)
        assert (targets["log_probs"][~real] == -np.inf).all()
        assert (targets["log_tail"][~real] == 0).all()


def test_random_samples_sum_to_one_and_skip_padding(written, corpus):
    store = teachers.open_store(written / "random")
    for row, (_, segment_ids) in enumerate(corpus.rows):
        weights = store[row]["targets"]["weights"]
        assert weights.shape[1] == store.manifest.width
        np.testing.assert_allclose(weights.sum(axis=-1), segment_ids > 0, rtol=1e-6)


def test_threshold_samples_sum_to_one_within_tau_and_skip_padding(written, corpus):
    store = teachers.open_store(written / "threshold")
    for row, (_, segment_ids) in enumerate(corpus.rows):
        weights = store[row]["targets"]["weights"]
        assert weights.shape[1] == store.manifest.width <= 26
        real = segment_ids > 0
        # And each of the exact ones within a step of 1/64.
        assert (np.abs(weights[real].sum(axis=-1) - 1) < 0.0401 + 1 / 64).all()
        assert not weights[~real].any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        teachers.WriteConfig(batch_rows=1, rows_per_shard=4, chunk_tokens=1),
        teachers.WriteConfig(batch_rows=7, rows_per_shard=4, chunk_tokens=10_000),
    ],
)
def test_batch_and_chunk_change_no_sample(tmp_path, written, teacher, corpus, config):
    write(tmp_path, teacher, corpus, config)
    assert_alike(tmp_path, written)


@pytest.mark.slow
def test_order_and_shards_change_no_sample(tmp_path, written, teacher, corpus):
    shuffled = ListCorpus(corpus.rows[::-1], fingerprint="corpus-b")
    write(tmp_path, teacher, shuffled, teachers.WriteConfig(batch_rows=3, rows_per_shard=5))
    for name in SCHEMES:
        expected, found = rows_by_key(written / name), rows_by_key(tmp_path / name)
        assert expected.keys() == found.keys()
        for key, arrays in expected.items():
            jax.tree.map(np.testing.assert_array_equal, arrays, found[key])


def test_four_devices_write_the_same(tmp_path, written, teacher, corpus):
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    write(tmp_path, teacher, corpus, sharding=NamedSharding(mesh, PartitionSpec("data")))
    assert_alike(tmp_path, written)


def test_rows_that_do_not_divide_over_the_devices_are_refused(tmp_path, teacher, corpus):
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    rows, config = NamedSharding(mesh, PartitionSpec("data")), teachers.WriteConfig(batch_rows=6)
    with pytest.raises(InputError, match=r"batch_rows: 6 rows do not divide over the 4 parts"):
        write(tmp_path, teacher, corpus, config, sharding=rows)


@pytest.mark.slow
def test_devices_that_share_rows_and_vocabulary_write_the_same(tmp_path, written, teacher, corpus):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "tensor"))
    write(tmp_path, teacher, corpus, sharding=NamedSharding(mesh, PartitionSpec("data")))
    assert_alike(tmp_path, written)


@pytest.mark.slow
def test_the_logits_of_a_split_vocabulary_stay_where_they_are(teacher):
    """In the compiled pass nothing as large as one row's logits travels between devices."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "tensor"))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    params = jax.device_put(
        teacher.model.params,
        {
            "embedding": NamedSharding(mesh, PartitionSpec()),
            "unembedding": NamedSharding(mesh, PartitionSpec(None, "tensor")),
        },
    )
    tokens, seeds = (jax.device_put(np.ones((8, n), d), rows) for n, d in ((12, "i4"), (2, "u4")))
    text = (
        forward.ask_teacher.lower(
            params, tokens, tokens, tokens, seeds,
            config=teacher.model.config,
            schemes=tuple(SCHEMES.values()),
            temperature=1.0,
            chunk_tokens=96,
            hidden_states=teacher.hidden_states,
            sharding=rows,
        )
        .compile()
        .as_text()
    )  # fmt: skip
    assert "all-reduce" in text
    moved = re.findall(r"= (.*) (?:all-\w+|collective-permute|reduce-scatter)(?:-start)?\(", text)
    sizes = [
        math.prod(int(size) for size in shape.split(",") if size)
        for result in moved
        for shape in re.findall(r"\w\d+\[([\d,]*)\]", result)
    ]
    # 2 rows of 12 tokens on a device, 30 ids of each, from 2 devices.
    assert max(sizes) <= 24 * 31 * 2
    assert max(sizes) < 24 * VOCAB / 4


def test_another_teacher_draws_other_samples(tmp_path, written, teacher, corpus):
    class Renamed(type(teacher)):
        @property
        def model(self):
            params = super().model.params
            return models.Model(super().model.config, params | {"final_norm": jnp.ones(3)})

    write(tmp_path, Renamed(teacher.table), corpus)
    one, other = rows_by_key(written / "random"), rows_by_key(tmp_path / "random")
    assert all(set(one[key]["ids"][0]) != set(other[key]["ids"][0]) for key in one)


class Interrupted(Exception):
    """Raised in the middle of a corpus."""


class BrokenCorpus(ListCorpus):
    """Ends the writer when row 6 is read to be written: the first time, its tokens are counted."""

    read = 0

    def __getitem__(self, index):
        self.read += index == 6
        if self.read == 2:
            raise Interrupted
        return super().__getitem__(index)


def test_an_interrupted_writer_goes_on(tmp_path, written, teacher, corpus):
    with pytest.raises(Interrupted):
        write(tmp_path, teacher, BrokenCorpus(corpus.rows))
    read = []

    class Counted(ListCorpus):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    write(tmp_path, teacher, Counted(corpus.rows))
    assert read == [*range(10), *range(4, 10)]
    assert contents(tmp_path) == contents(written)
    write(tmp_path, teacher, Counted(corpus.rows))
    assert len(read) == 26


def test_only_the_store_that_misses_a_shard_gets_it(tmp_path, written, teacher, corpus):
    write(tmp_path, teacher, corpus)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "top").iterdir()}
    for path in (tmp_path / "random").iterdir():
        path.unlink()
    write(tmp_path, teacher, corpus)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "top").iterdir()} == before
    assert contents(tmp_path) == contents(written)


def test_a_failure_of_the_background_fails_the_call(tmp_path, monkeypatch, teacher, corpus):
    def full(self, shard, records):
        raise OSError("no space left on device")

    monkeypatch.setattr(StoreWriter, "commit", full)
    with pytest.raises(OSError, match="no space left"):
        write(tmp_path, teacher, corpus)
    assert not list(tmp_path.rglob("store.json"))


def test_the_teacher_reads_on_while_a_shard_is_written(
    tmp_path, monkeypatch, written, teacher, corpus
):
    """The first is not committed before the teacher was asked about the second."""
    asked, reads_on, waited = [], threading.Event(), []
    ask, commit = writer.ask_teacher, StoreWriter.commit

    def ask_and_tell(*arguments, **options):
        asked.append(arguments)
        if len(asked) == 2:
            reads_on.set()
        return ask(*arguments, **options)

    def commit_late(self, shard, records):
        if shard == 0:
            waited.append(reads_on.wait(timeout=20))
        commit(self, shard, records)

    monkeypatch.setattr(writer, "ask_teacher", ask_and_tell)
    monkeypatch.setattr(StoreWriter, "commit", commit_late)
    write(tmp_path, teacher, corpus)
    assert waited == [True] * len(SCHEMES)
    assert contents(tmp_path) == contents(written)


def test_logits_that_are_not_finite_are_refused(tmp_path, teacher, corpus):
    table = teacher.table.copy()
    table[corpus.rows[5][0][0]] = np.nan
    with pytest.raises(InputError, match=r"logits for row \d are not finite"):
        write(tmp_path, type(teacher)(table), corpus)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature: 0.0 is not positive"),
        ({"temperature": np.inf}, "temperature: inf is not positive and finite"),
        ({"reuse": {"typo": []}}, r"reuse: \['typo'\] are not schemes"),
        ({"corpus": ListCorpus([])}, "has no rows"),
        ({"corpus": make_corpus(2, vocab=VOCAB + 40)}, "vocabulary ends at 299"),
        ({"corpus": make_corpus(2, time=6)}, r"row 0 has tokens of shape \(6,\), not \(12,\)"),
        ({"corpus": ListCorpus([(np.ones(12, "i4"), np.ones(6, "i4"))])}, "segment_ids of shape"),
    ],
)
def test_wrong_inputs_are_refused(tmp_path, teacher, corpus, options, message):
    other = options.pop("corpus", corpus)
    other.sequence_length = 12
    with pytest.raises(InputError, match=message):
        write(tmp_path, teacher, other, **options)


def test_a_scheme_without_a_directory_is_refused(tmp_path, teacher, corpus):
    with pytest.raises(InputError, match="directories"):
        teachers.write_stores({"a": tmp_path}, SCHEMES, teacher.model, corpus)


_SLOW_WRITER = """
import sys, time
from teachers import known, test_writer

class Slow(known.ListCorpus):
    def __getitem__(self, index):
        time.sleep(0.2)
        return super().__getitem__(index)

test_writer.write(sys.argv[1], known.make_teacher(), Slow(known.make_corpus(10).rows))
"""


@pytest.mark.slow
def test_a_killed_process_leaves_what_another_can_finish(tmp_path, written, teacher, corpus):
    root = pathlib.Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOW_WRITER, str(tmp_path)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": f"{root}:{root / 'tests'}"},
    )
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("random/*.array_record-00001-of-*")):
            assert process.poll() is None, "the writer ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not list(tmp_path.rglob("store.json"))
    write(tmp_path, teacher, corpus)
    assert contents(tmp_path) == contents(written)
