"""The directory: what TFDS sees, restarts at every boundary, damage."""

import json
import os
import pathlib
import resource
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

from distill_jax import artifacts, teachers
from distill_jax.artifacts import InputError
from distill_jax.teachers import shards
from distill_jax.teachers.manifest import Identity, make_codec
from distill_jax.teachers.shards import Record, StoreWriter

ROWS, PER_SHARD, TIME = 7, 3, 4
SCHEME = teachers.RandomSampling(draws=4)


def identity(**changes):
    fields = {
        "teacher": "t", "tokenizer": "k", "corpus": "c", "rows": ROWS, "rows_per_shard": PER_SHARD,
        "sequence_length": TIME, "vocab_size": 70_000, "temperature": 1.0, "scheme": SCHEME,
    }  # fmt: skip
    return Identity(**fields | changes)


# Every id's frequency in a corpus; half of them never occur.
TOKEN_COUNTS = np.maximum(np.random.default_rng(7).integers(-50, 50, 70_000), 0)


def columns_of(row):
    """Ids of a token from frequent to rare, as a store gives them back."""
    rng = np.random.default_rng(row)
    ids = rng.integers(0, 70_000, (TIME, 4))
    return {
        "length": rng.integers(1, 5, TIME),
        "entropy": rng.integers(0, 200, TIME) / 32,
        "label_log_prob": -rng.integers(1, 400, TIME) / 32 * (np.arange(TIME) < TIME - 1),
        "ids": np.array([sorted(some, key=lambda i: (-TOKEN_COUNTS[i], i)) for some in ids]),
        "counts": rng.integers(1, 5, (TIME, 4)),
    }


def record_of(row):
    columns, key = columns_of(row), f"key{row}"
    data = make_codec(identity(), TOKEN_COUNTS).encode(columns, key)
    width = int(columns["length"].max())
    return Record(row_id=row, key=key, data=data, tokens=TIME, labels=TIME - 1, width=width)


def write(directory):
    """Writes, or goes on writing, a store without any model."""
    writer = StoreWriter(directory, identity(), TOKEN_COUNTS)
    for shard in writer.begin():
        writer.commit(shard, [record_of(row) for row in identity().shard_rows(shard)])
    return writer.finish()


def contents(directory):
    root = pathlib.Path(directory)
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("written") / "store"
    write(directory)
    return directory


def test_what_was_written_is_read(written):
    store = teachers.open_store(written)
    assert len(store) == ROWS
    assert store.manifest.tokens == ROWS * TIME
    assert store.manifest.width == max(columns_of(row)["length"].max() for row in range(ROWS))
    for row in range(ROWS):
        expected, record = columns_of(row), store[row]
        assert (record["row_id"], record["key"]) == (row, f"key{row}")
        targets = record["targets"]
        for name in ("entropy", "label_log_prob"):
            np.testing.assert_array_equal(targets[name], expected[name])
        for token, length in enumerate(expected["length"]):
            np.testing.assert_array_equal(
                targets["ids"][token, :length], expected["ids"][token, :length]
            )
            weights = expected["counts"][token, :length] / 4
            np.testing.assert_allclose(targets["weights"][token, :length], weights)
            assert not targets["weights"][token, length:].any()
    with pytest.raises(IndexError):
        store[ROWS]


def test_tfds_reads_the_directory_and_its_slices(written):
    builder = tfds.builder_from_directory(written)
    assert builder.info.splits["rows"].num_examples == ROWS
    assert [record["row_id"] for record in builder.as_data_source("rows")] == list(range(ROWS))
    part = builder.as_data_source("rows[4:6]")
    assert [record["key"] for record in part] == [b"key4", b"key5"]
    assert part[0]["record"] == record_of(4).data


def test_rows_are_found_by_key(written):
    store = teachers.open_store(written)
    found = store.positions(["key5", "nothing", "key0", "zzz", "key55"])
    assert found.tolist() == [5, -1, 0, -1, -1]


class Crash(Exception):
    """The process dies here."""


def crash_at(monkeypatch, number):
    """Dies before, or after, the call of this number that makes something durable or visible."""
    count = 0

    def interrupted(original):
        def call(*args, **kwargs):
            nonlocal count
            count += 2
            if count - 1 == number:
                raise Crash
            result = original(*args, **kwargs)
            if count == number:
                raise Crash
            return result

        return call

    for module, name in ((os, "fsync"), (os, "replace"), (shutil, "rmtree"), (np, "save")):
        monkeypatch.setattr(module, name, interrupted(getattr(module, name)))


@pytest.mark.slow
def test_a_writer_killed_at_any_boundary_ends_with_the_same_bytes(written, tmp_path):
    undisturbed = contents(written)
    crashes = 0
    for number in range(1, 200):
        directory = tmp_path / str(number)
        with pytest.MonkeyPatch.context() as monkeypatch:
            crash_at(monkeypatch, number)
            try:
                write(directory)
                break
            except Crash:
                crashes += 1
        write(directory)
        assert contents(directory) == undisturbed, f"killed at boundary {number}"
    # Three shards of four calls or more, a plan, an index and a manifest, each before and after.
    assert 30 < crashes < 199


def test_a_second_writer_starts_at_the_first_missing_shard(tmp_path):
    writer = StoreWriter(tmp_path, identity(), TOKEN_COUNTS)
    assert writer.begin() == [0, 1, 2]
    writer.commit(0, [record_of(row) for row in range(3)])
    assert StoreWriter(tmp_path, identity(), TOKEN_COUNTS).begin() == [1, 2]
    with pytest.raises(InputError, match=r"no store\.json"):
        teachers.open_store(tmp_path)
    write(tmp_path)
    assert StoreWriter(tmp_path, identity(), TOKEN_COUNTS).begin() == []


def test_a_plan_that_is_none_is_refused(tmp_path):
    StoreWriter(tmp_path, identity(), TOKEN_COUNTS).begin()
    (tmp_path / ".progress" / "plan.json").write_text("[]")
    with pytest.raises(InputError, match=r"plan\.json: not a JSON object"):
        StoreWriter(tmp_path, identity(), TOKEN_COUNTS).begin()


@pytest.mark.parametrize("finished", [False, True])
def test_other_targets_are_not_overwritten(tmp_path, finished):
    StoreWriter(tmp_path, identity(), TOKEN_COUNTS).begin()
    if finished:
        write(tmp_path)
    before = contents(tmp_path)
    for changes, message in (
        ({"teacher": "u"}, "teacher: 't' -> 'u'"),
        ({"temperature": 2.0}, "temperature: 1.0 -> 2.0"),
        ({"scheme": teachers.RandomSampling(draws=5)}, "scheme.draws: 4 -> 5"),
    ):
        with pytest.raises(InputError, match=f"already holds other targets.*{message}"):
            StoreWriter(tmp_path, identity(**changes), TOKEN_COUNTS).begin()
    assert contents(tmp_path) == before


@pytest.fixture
def copy(written, tmp_path):
    return pathlib.Path(shutil.copytree(written, tmp_path / "copy"))


def test_a_flipped_bit_in_any_file_is_noticed(copy):
    for path in sorted(copy.iterdir()):
        if path.name == "store.json":
            continue
        original = path.read_bytes()
        damaged = bytearray(original)
        damaged[len(damaged) // 2] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=path.name):
            teachers.verify(copy)
        path.write_bytes(original)
    assert teachers.verify(copy) == {"rows": ROWS, "tokens": ROWS * TIME}


def test_damage_is_noticed_at_reading_too(copy):
    path = copy / shards.shard_name(identity(), 1)
    data = path.read_bytes()
    at = data.index(b"key4")
    damaged = bytearray(data)
    damaged[at + 40] ^= 1
    path.write_bytes(damaged)
    store = teachers.open_store(copy)
    store[2]
    with pytest.raises(InputError, match=rf"{path.name}: row 4 is damaged"):
        store[4]


def test_a_record_replaced_by_a_valid_one_is_noticed(copy):
    """The container's own checksums fit here; ours bind a record to its row."""
    swapped = [record_of(row) for row in (3, 5, 4)]
    other = StoreWriter(copy / "other", identity(), TOKEN_COUNTS)
    other.begin()
    other.commit(1, swapped)
    name = shards.shard_name(identity(), 1)
    (copy / "other" / name).replace(copy / name)
    with pytest.raises(InputError, match=r"row 4 is damaged .*checksum"):
        teachers.open_store(copy)[4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.pop("identity"), "not the manifest of a store"),
        (lambda value: value["identity"].update(codec=1), "codec 1, this program reads 2"),
        (lambda value: value["identity"].update(temperature=2.0), "was changed after"),
        (lambda value: value.update(width=1), "was changed after"),
        (lambda value: value.pop("checksum"), "not the manifest of a store"),
        (lambda value: value.update(identity="abc"), "not the manifest of a store"),
    ],
)
def test_a_wrong_manifest_is_refused(copy, change, message):
    value = artifacts.read_json(copy / "store.json")
    change(value)
    (copy / "store.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=rf"store\.json: .*{message}"):
        teachers.open_store(copy)


def of_identity(**changes):
    return lambda value: value["identity"].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_identity(rows="7"), r"store\.json: .*rows is '7'"),
        (of_identity(rows_per_shard=0), r"store\.json: rows_per_shard: 0 is less than 1"),
        (of_identity(temperature="warm"), r"store\.json: .*temperature is 'warm'"),
        (of_identity(scheme={"name": "x"}), r"store\.json: scheme: 'x' is none of"),
        (lambda value: value.update(width=None), r"store\.json: .*width is None"),
        (lambda value: value.update(files=[1]), r"store\.json: not the manifest"),
        (of_identity(rows=10**6), r"store\.json: does not name teacher_targets"),
        (lambda value: value["files"].pop("keys.npy"), r"store\.json: does not name keys\.npy"),
        (of_identity(rows=8), "copy: has keys of 7 rows, not 8"),
        (of_identity(vocab_size=9), r"token_counts\.bin: not the counts of a vocabulary"),
        (of_identity(vocab_size=70_001), r"token_counts\.bin: has counts of 70000 ids"),
    ],
)
def test_a_manifest_that_was_made_up_is_refused(copy, change, message):
    """With a checksum that fits."""
    value = artifacts.read_json(copy / "store.json")
    del value["checksum"]
    change(value)
    artifacts.write_json(copy / "store.json", value | {"checksum": artifacts.fingerprint(value)})
    with pytest.raises(InputError, match=message):
        teachers.open_store(copy)


def test_a_missing_shard_is_named(copy):
    name = shards.shard_name(identity(), 2)
    (copy / name).unlink()
    with pytest.raises(InputError, match=f"{name}: missing"):
        teachers.open_store(copy)
    with pytest.raises(InputError, match="no such file"):
        teachers.open_store(copy / "nowhere")


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: bytes([data[0] ^ 8]) + data[1:]]
)
@pytest.mark.parametrize(
    "name", ["dataset_info.json", "features.json", "keys.npy", "token_counts.bin"]
)
def test_damage_of_a_small_file_is_noticed_at_opening(copy, name, damage):
    path = copy / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=rf"{name}: its hash does not fit"):
        teachers.open_store(copy)


@pytest.mark.parametrize("length", [0, 1 << 16, (1 << 16) + 50, (1 << 17) - 1])
def test_a_shard_cut_short_is_noticed_at_reading(copy, length):
    path = copy / shards.shard_name(identity(), 1)
    os.truncate(path, length)
    store = teachers.open_store(copy)
    store[2]
    for _ in range(2):
        with pytest.raises(InputError, match=rf"{path.name}: row 4 is damaged"):
            store[4]


@pytest.mark.parametrize("size", [100, 50_000])
def test_a_full_disk_is_told_in_a_line_that_names_the_file(written, tmp_path, size):
    """No file may grow beyond a size; here the first beyond it is the plan, or a shard."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(OSError, match=f"File too large.*{tmp_path}") as failure:
            write(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(str(failure.value).splitlines()) == 1
    assert not [name for name in contents(tmp_path) if name.startswith("teacher_targets")]
    write(tmp_path)
    assert contents(tmp_path) == contents(written)


def test_describe_accounts_for_every_byte_of_the_records(written):
    figures = teachers.describe(written, sample=ROWS)
    lengths = np.concatenate([columns_of(row)["length"] for row in range(ROWS)])
    shares = {int(n): float(np.mean(lengths == n)) for n in np.unique(lengths)}
    assert figures["ids_per_token"] == pytest.approx(shares)
    assert figures["mean_ids"] == pytest.approx(lengths.mean())
    parts = dict(figures["bytes_per_token"])
    on_disk = sum(path.stat().st_size for path in written.iterdir() if path.name != "store.json")
    assert parts.pop("on_disk") * ROWS * TIME == pytest.approx(on_disk)
    record_bytes = sum(len(record_of(row).data) for row in range(ROWS))
    assert sum(parts.values()) * ROWS * TIME == pytest.approx(record_bytes)
    assert figures["identity"]["scheme"] == {"name": "random_sampling", "draws": 4}
    rows = [columns_of(row) for row in range(ROWS)]
    mean = {name: np.mean([row[name] for row in rows]) for name in ("entropy", "label_log_prob")}
    assert figures["mean_entropy"] == pytest.approx(mean["entropy"], rel=1e-3)
    # The last token of each row has no label.
    expected = -mean["label_log_prob"] * TIME / (TIME - 1)
    assert figures["teacher_cross_entropy"] == pytest.approx(expected, rel=1e-3)
    json.dumps(figures)
