import json

import pyarrow
import pyarrow.parquet
import pytest

from distill_jax.artifacts import InputError
from distill_jax.data import read_texts


def test_jsonl_gives_the_field_in_order(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"id": i, "body": text}) for i, text in enumerate([" one\n", "", "zwö"])]
    path.write_text("\n".join([lines[0], "", *lines[1:]]))
    assert list(read_texts(path, field="body")) == ["one", "zwö"]


def test_parquet_gives_the_field_of_its_rows(tmp_path):
    for name, texts in (("b.parquet", ["three"]), ("a.parquet", ["one", " ", "two"])):
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / name)
    assert list(read_texts(tmp_path)) == ["one", "two", "three"]
    with pytest.raises(InputError, match=r"a\.parquet: row 1: no text in the field 'body'"):
        list(read_texts(tmp_path, field="body"))


def test_a_folder_gives_its_texts_by_name(tmp_path):
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    (tmp_path / "empty.txt").write_text(" \n")
    assert list(read_texts(tmp_path)) == ["a.txt", "b.txt"]
    assert list(read_texts(tmp_path / "b.txt")) == ["b.txt"]
    (tmp_path / "z.jsonl").touch()
    with pytest.raises(InputError, match=r"texts are in a\.txt or in z\.jsonl"):
        read_texts(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"other": 1}\n', "a.jsonl: line 2: no text in the field"),
        ("a.jsonl", b'{"text": 5}\n', "a.jsonl: line 1: no text in the field 'text'"),
        ("a.jsonl", b"[1]\n", "a.jsonl: line 1: not a JSON object"),
        ("a.jsonl", b"{oops\n", "a.jsonl: line 1: not JSON"),
        ("a.jsonl", b'"\xff"\n', "a.jsonl: line 1: not JSON"),
        ("a.txt", b"\xff", "a.txt: not UTF-8"),
        ("a.csv", b"", "a.csv: records are a .jsonl"),
    ],
)
def test_wrong_files_are_one_clear_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        list(read_texts(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_missing_sources_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_texts(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match=r"no .jsonl or .parquet file inside"):
        read_texts(tmp_path)
