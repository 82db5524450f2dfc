"""Stores in a bucket: the one of these tests lies in memory, and no disk knows of it."""

import builtins
import os
import sys

import fsspec
import numpy as np
import pytest
from buckets import Bucket
from etils import epath
from etils.epath import backend, gpath

from distill_jax import teachers
from distill_jax.artifacts import InputError

from .known import ListCorpus, make_corpus, make_teacher
from .test_store import contents as files_of
from .test_store import write as write_store
from .test_writer import BrokenCorpus, Interrupted
from .test_writer import write as write_targets

REMOTE = "gs://bucket/run"


# An audit hook stays for good; it looks at what the operating system is asked for here alone.
_watching = []


def _look(event, arguments):
    if _watching and event.startswith(("open", "os.", "shutil.")) and "gs:" in str(arguments):
        _watching.append((event, arguments))


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """An empty bucket; the test fails if the operating system heard of a path in it."""
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setattr(
        backend._FileSystemSpecBackend,
        "_get_filesystem",
        lambda self, name: Bucket() if name == "gcs" else fsspec.filesystem(name),
    )
    monkeypatch.setenv("DISTILL_JAX_CACHE", str(tmp_path / "cache"))
    for module, name in ((os, "stat"), (os, "replace"), (os, "fsync"), (builtins, "open")):
        monkeypatch.setattr(module, name, refusing(getattr(module, name)))
    if not getattr(sys, "_bucket_hook", False):
        sys.addaudithook(_look)
        sys._bucket_hook = True
    _watching[:] = ["on"]
    yield Bucket()
    asked = _watching[1:]
    _watching.clear()
    assert not asked


def refusing(call):
    def guarded(path, *rest, **options):
        assert "gs:" not in str(path), f"{call.__name__} of {path}"
        return call(path, *rest, **options)

    return guarded


def contents(directory):
    return {path.name: path.read_bytes() for path in epath.Path(directory).iterdir()}


def test_a_store_in_a_bucket_has_the_bytes_of_one_on_disk_and_reads_alike(bucket, tmp_path):
    write_store(f"{REMOTE}/store")
    write_store(tmp_path / "store")
    assert contents(f"{REMOTE}/store") == files_of(tmp_path / "store")
    remote, local = (
        teachers.open_store(place) for place in (f"{REMOTE}/store", tmp_path / "store")
    )
    for row in (6, 0, 3, 6):
        found, expected = remote[row], local[row]
        np.testing.assert_equal(found, expected)
    assert remote.positions(["key5", "nothing"]).tolist() == [5, -1]
    assert teachers.verify(f"{REMOTE}/store") == teachers.verify(tmp_path / "store")
    assert teachers.describe(f"{REMOTE}/store") == teachers.describe(tmp_path / "store")


def test_shards_are_copied_once_when_they_are_read(bucket, tmp_path):
    write_store(f"{REMOTE}/store")
    store = teachers.open_store(f"{REMOTE}/store")
    assert not list((tmp_path / "cache").rglob("*array_record*"))
    store[4]
    (copy,) = (tmp_path / "cache").rglob("*array_record*")
    assert "00001-of" in copy.name
    (epath.Path(f"{REMOTE}/store") / copy.name).write_bytes(b"no one reads it again")
    assert store[5]["key"] == "key5"
    assert teachers.open_store(f"{REMOTE}/store")[3]["key"] == "key3"


@pytest.mark.slow
def test_a_store_written_anew_is_not_read_from_old_copies(bucket):
    write_store(f"{REMOTE}/store")
    assert teachers.open_store(f"{REMOTE}/store")[0]["key"] == "key0"
    bucket.rm(f"{REMOTE}/store", recursive=True)
    write_targets(REMOTE, make_teacher(), make_corpus(4))
    epath.Path(f"{REMOTE}/top").rename(f"{REMOTE}/store")
    assert teachers.open_store(f"{REMOTE}/store")[0]["key"] == make_corpus(4)[0]["key"]


@pytest.mark.parametrize("name", ["keys.npy", "teacher_targets-rows.array_record-00001-of-00003"])
def test_a_damaged_object_is_refused_and_not_kept(bucket, name, tmp_path):
    write_store(f"{REMOTE}/store")
    path = epath.Path(f"{REMOTE}/store/{name}")
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for _ in range(2):
        with pytest.raises(InputError, match=f"{path}: its hash does not fit the manifest"):
            teachers.open_store(f"{REMOTE}/store")[4]
    path.write_bytes(data)
    assert teachers.open_store(f"{REMOTE}/store")[4]["key"] == "key4"


def test_an_interrupted_writer_goes_on_and_other_targets_are_refused(bucket, tmp_path):
    teacher, corpus = make_teacher(), make_corpus(10)
    with pytest.raises(Interrupted):
        write_targets(REMOTE, teacher, BrokenCorpus(corpus.rows))
    assert not list(bucket.glob(f"{REMOTE}/*/store.json"))
    with pytest.raises(InputError, match=r"already holds other targets \(temperature"):
        write_targets(REMOTE, teacher, corpus, temperature=2.0)
    read = []

    class Counted(ListCorpus):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    write_targets(REMOTE, teacher, Counted(corpus.rows))
    assert read == [*range(10), *range(4, 10)]
    write_targets(tmp_path / "local", teacher, corpus)
    for name in ("top", "random", "threshold"):
        assert contents(f"{REMOTE}/{name}") == files_of(tmp_path / "local" / name)


def test_a_failed_upload_leaves_what_another_try_finishes(bucket, tmp_path, monkeypatch):
    whole = gpath.PosixGPath.write_bytes
    failed = []

    def half(self, data):
        if "array_record-00001" in self.name and "://" in str(self) and not failed:
            failed.append(self)
            whole(self, data[: len(data) // 2])
            raise OSError("connection reset")
        return whole(self, data)

    monkeypatch.setattr(gpath.PosixGPath, "write_bytes", half)
    with pytest.raises(OSError, match="connection reset"):
        write_store(f"{REMOTE}/store")
    write_store(f"{REMOTE}/store")
    write_store(tmp_path / "store")
    assert contents(f"{REMOTE}/store") == files_of(tmp_path / "store")


def test_reuse_and_join_take_stores_from_a_bucket(bucket):
    teacher, corpus = make_teacher(), make_corpus(6)
    write_targets(f"{REMOTE}/old", teacher, corpus)
    grown = ListCorpus([*corpus.rows, *make_corpus(2, seed=8).rows], fingerprint="corpus-b")
    figures = write_targets(f"{REMOTE}/new", teacher, grown, reuse={"top": [f"{REMOTE}/old/top"]})
    assert figures["top"]["reused"] == 6
    source = teachers.join(grown, {"t": teachers.open_store(f"{REMOTE}/new/top")})
    for row in range(8):
        real = source[row]["segment_ids"] > 0
        likeliest = teacher.table[source[row]["tokens"]].argmax(axis=-1)
        np.testing.assert_array_equal(source[row]["targets"]["t"]["ids"][real, 0], likeliest[real])
