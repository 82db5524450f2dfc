import os

import numpy as np
import pytest
from etils import epath

from distill_jax import artifacts
from distill_jax.artifacts import InputError


def test_a_file_is_synced_before_it_takes_its_name(tmp_path, monkeypatch):
    calls = []
    sync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: (calls.append(sorted(os.listdir(tmp_path))), sync(file))
    )
    artifacts.write_json(tmp_path / "a.json", {"x": 1})
    assert calls == [[".a.json.tmp"]]
    assert artifacts.read_json(tmp_path / "a.json") == {"x": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    artifacts.write_json(tmp_path / "a.json", 1)

    def full(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        artifacts.write_json(tmp_path / "a.json", 2)
    assert artifacts.read_json(tmp_path / "a.json") == 1


def test_resolve_finds_data_of_a_package_without_importing_it():
    place = artifacts.resolve("package://numpy/__init__.py")
    assert place.read_text()
    with pytest.raises(InputError, match="'no_such_package' is not installed"):
        artifacts.resolve("package://no_such_package/file")
    with pytest.raises(InputError, match="no such file"):
        artifacts.resolve("package://numpy/nothing.here")


def test_a_bucket_without_its_client_is_told(monkeypatch):
    def exists(self):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(type(epath.Path("gs://bucket")), "exists", exists)
    with pytest.raises(InputError, match="gs://bucket/model: Please install gcsfs"):
        artifacts.resolve("gs://bucket/model")


def test_fingerprints_follow_content(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("one")
    first = artifacts.fingerprint_path(tmp_path / "folder")
    assert first == artifacts.fingerprint_path(tmp_path / "folder")
    (tmp_path / "folder" / "b").write_text("two")
    assert first != artifacts.fingerprint_path(tmp_path / "folder")
    file = artifacts.fingerprint_path(tmp_path / "folder" / "a")
    (tmp_path / "folder" / "a").write_text("ONE")
    assert file != artifacts.fingerprint_path(tmp_path / "folder" / "a")
    assert artifacts.fingerprint({"a": 1, "b": 2}) == artifacts.fingerprint({"b": 2, "a": 1})


def test_of_many_files_each_gives_a_share(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "_FOLDER_BYTES", 100)
    for number in range(10):
        (tmp_path / f"{number}").write_bytes(bytes(1000))
    first = artifacts.fingerprint_path(tmp_path)
    seen = []
    for content in (bytes(500) + b"x" + bytes(499), bytes(999) + b"x", bytes(1001)):
        (tmp_path / "7").write_bytes(content)
        seen.append(artifacts.fingerprint_path(tmp_path) != first)
    assert seen == [False, True, True]  # 64 bytes spread over each are read, and its size


def test_a_fingerprint_stays_what_it_was(tmp_path):
    rng = np.random.default_rng(0)
    for name, size in (("a", 1000), ("b", (65 << 20) + 17)):
        (tmp_path / name).write_bytes(rng.bytes(size))
    assert artifacts.fingerprint_path(tmp_path) == "9a146bf597618523"


def test_diff_names_every_leaf_that_differs():
    stored, wanted = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}
    assert artifacts.diff(stored, wanted) == ["a.c: 2 -> 4", "d: 3 -> None", "e: None -> 5"]
