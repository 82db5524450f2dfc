import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
from buckets import Bucket
from etils import epath
from etils.epath import backend, gpath

from distill_jax.artifacts import InputError
from distill_jax.data import Rejects, read_records, records

RECORDS = [
    {"id": 1, "turns": [{"role": "user", "content": "zwö"}, {"role": "assistant", "content": "2"}]},
    {"id": 2, "turns": [{"role": "user", "content": "日本\n"}]},
    {"id": 3, "turns": []},
]


def write_lines(path, records=RECORDS):
    path.write_text("\n\n".join(map(json.dumps, records)) + "\n")


def write_list(path):
    path.write_text(json.dumps(RECORDS, indent=1))


def write_parquet(path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path, row_group_size=2)


class Builder(tfds.core.GeneratorBasedBuilder):
    """The records in a TFDS dataset."""

    name = "chats"
    VERSION = tfds.core.Version("1.0.0")
    code_path = None

    def _info(self):
        turn = {"role": tfds.features.Text(), "content": tfds.features.Text()}
        features = {
            "id": tfds.features.Scalar(np.int64),
            "turns": tfds.features.Sequence(turn),
            "again": tfds.features.Dataset(turn),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for record in RECORDS:
            yield record["id"], record | {"again": record["turns"]}


@pytest.mark.parametrize(
    ("name", "write", "places"),
    [
        ("a.jsonl", write_lines, ["line 1", "line 3", "line 5"]),
        ("a.json", write_list, ["record 1", "record 2", "record 3"]),
        ("a.parquet", write_parquet, ["row 1", "row 2", "row 3"]),
    ],
)
def test_every_kind_of_file_gives_the_same_records(tmp_path, name, write, places):
    write(tmp_path / name)
    found = list(read_records(tmp_path / name))
    assert [record for _, record in found] == RECORDS
    assert [place for place, _ in found] == [f"{tmp_path / name}: {place}" for place in places]


def test_a_folder_gives_its_files_by_name(tmp_path):
    write_parquet(tmp_path / "b.parquet")
    write_lines(tmp_path / "a.jsonl", [{"id": 0}])
    (tmp_path / "README.md").write_text("not this")
    assert [record["id"] for _, record in read_records(tmp_path)] == [0, 1, 2, 3]


def write_tfds(directory):
    Builder(data_dir=directory, file_format="array_record").download_and_prepare()
    return directory / "chats" / "1.0.0"


def test_a_tfds_dataset_gives_its_split(tmp_path):
    place = write_tfds(tmp_path)
    found = list(read_records(place, split="train[:2]"))
    assert [where for where, _ in found] == [f"{place}: train[:2] record {n}" for n in (1, 2)]
    # TFDS keeps a sequence of records by column, and a dataset as it is.
    columns = {"role": ["user", "assistant"], "content": ["zwö", "2"]}
    assert found[0][1] == {"id": 1, "turns": columns, "again": RECORDS[0]["turns"]}
    for split in ("test", "train[:x]"):
        with pytest.raises(InputError, match=r"1\.0\.0: split '") as caught:
            list(read_records(place, split=split))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 20, 1000])
@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_spans_of_lines_share_them_out(tmp_path, monkeypatch, size, end):
    monkeypatch.setattr(records, "_SPAN_BYTES", size)
    path = tmp_path / "a.jsonl"
    lines = ['{"a": "é"}', "", '{"a": 1}', " " * 9, '{"long": "' + "x" * 30 + '"}', '{"a": 2}\r']
    path.write_bytes(("\n".join(lines) + end).encode())
    spans = records.spans(epath.Path(path))
    assert len(spans) == -(-path.stat().st_size // size)
    found = [record for span in spans for _, record in records.read_span(path, span)]
    assert found == [json.loads(line) for line in lines if line.strip()]


def test_spans_of_tables_and_datasets_share_them_out(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_SPAN_RECORDS", 2)
    table = pyarrow.table({"a": list(range(10))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    for path, counts in (
        (epath.Path(tmp_path / "a.parquet"), [4, 4, 2]),
        (epath.Path(write_tfds(tmp_path)), [2, 1]),
    ):
        parts = [list(records.read_span(path, span)) for span in records.spans(path)]
        assert list(map(len, parts)) == counts
        # Places as well: those of rows count from the file's first.
        assert [found for part in parts for found in part] == list(read_records(path))


def test_a_bad_line_is_placed_from_the_start_of_its_span(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_SPAN_BYTES", 15)
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a": 3}\n{"a"\n')
    with pytest.raises(InputError, match=r"a\.jsonl: line 2 after byte 15: not JSON"):
        list(records.read_span(path, records.spans(epath.Path(path))[1]))


def test_files_lie_in_a_bucket_too(monkeypatch):
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setattr(
        backend._FileSystemSpecBackend, "_get_filesystem", lambda self, name: Bucket()
    )
    place = epath.Path("gs://bucket/data")
    place.mkdir(parents=True)
    write_lines(place / "a.jsonl")
    write_list(place / "b.json")
    with (place / "c.parquet").open("wb") as file:
        write_parquet(file)
    for name in ("a.jsonl", "b.json", "c.parquet"):
        found = list(read_records(f"gs://bucket/data/{name}"))
        assert [record for _, record in found] == RECORDS
        assert found[0][0].startswith(f"gs://bucket/data/{name}: ")
    assert len(list(read_records("gs://bucket/data"))) == 6


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a"\n', r"a\.jsonl: line 3: not JSON \("),
        ("a.jsonl", b'"\xff"\n', r"a\.jsonl: line 1: not JSON \("),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl: line 1: not JSON \("),
        ("a.jsonl", b'{"a": 1}\n[2]\n', r"a\.jsonl: line 2: not a JSON object"),
        ("a.json", b'{"a": 1}', r"a\.json: not a list; records that are lines belong in"),
        ("a.json", b'{"a": 1}\n{"a": 1}', r"a\.json: not JSON \("),
        ("a.json", b"[{}, 5]", r"a\.json: record 2: not a JSON object"),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet: damaged \("),
        ("a.csv", b"", r"a\.csv: records are a \.jsonl, \.json or \.parquet file"),
    ],
)
def test_wrong_files_are_one_clear_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        list(read_records(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_missing_files_are_refused_before_the_first_record(tmp_path):
    with pytest.raises(InputError, match=r"absent\.jsonl: no such file"):
        read_records(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match=r"no \.jsonl or \.parquet file inside"):
        read_records(tmp_path)


def test_bad_records_may_be_skipped_and_are_remembered(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a"\n{"a": 3}\n4\n')
    rejects = Rejects("skip")
    assert [record["a"] for _, record in read_records(path, rejects=rejects)] == [1, 3]
    assert [message.split(" (")[0] for message in rejects.messages] == [
        f"{path}: line 2: not JSON",
        f"{path}: line 4: not a JSON object",
    ]
    with rejects.at("here"):
        raise InputError("wrong")
    assert rejects.messages[2:] == ["here: wrong"]
    with pytest.raises(InputError, match="here: wrong"), Rejects("refuse").at("here"):
        raise InputError("wrong")
