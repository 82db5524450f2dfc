"""A corpus made in a Beam pipeline; `scripts/test --beam` runs this where there is Beam."""

import hashlib
import json
import pathlib
import re
import shlex

import pyarrow
import pyarrow.parquet
import pytest
from buckets import Bucket
from etils import epath
from etils.epath import backend, gpath
from tensorflow_datasets.core.utils import shard_utils

from distill_jax import cli, data
from distill_jax.artifacts import InputError
from distill_jax.data import records

pytest.importorskip("apache_beam", reason="needs Apache Beam: scripts/test --beam")
from distill_jax.data import on_beam

# Beam and what it imports warn of themselves.
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.slow]
ROOT = pathlib.Path(__file__).parents[2]
TINY, README = str(ROOT / "configs" / "tiny.py"), ROOT / "README.md"
RUNNER = "FnApiRunner"  # in this process


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Stretches, chunks and files so small that everything crosses their borders."""
    monkeypatch.setattr(records, "_SPAN_BYTES", 700)
    monkeypatch.setattr(on_beam, "_TOKENS_AT_ONCE", 200)
    monkeypatch.setattr(on_beam, "_KEYS_AT_ONCE", 7)


def write_sources(folder, passages):
    """Three files of lines and one table; some passages are there again, in both sources too."""
    (folder / "in").mkdir(parents=True)
    for number, texts in enumerate((passages[:90], passages[60:130], [*passages[:5], "x"])):
        lines = [json.dumps({"passage": text}) for text in texts]
        (folder / "in" / f"{number}.jsonl").write_text("\n".join(lines))
    table = pyarrow.table({"passage": [*passages[120:], " " + passages[0]]})
    with (folder / "in" / "table.parquet").open("wb") as file:
        pyarrow.parquet.write_table(table, file, row_group_size=30)
    (folder / "out").mkdir()
    (folder / "out" / "a.txt").write_text("another kind of text " * 40)
    (folder / "out" / "b.txt").write_text(passages[3])


def make_config(folder, **changes):
    defaults = {
        "source": str(folder / "in"),
        "out_of_domain": str(folder / "out"),
        "sequence_length": 32,
        "held_out_fraction": 0.2,
    }
    return data.CorpusConfig(**defaults | changes)


def files_of(directory):
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sequence_length": 3000, "end_of_text": True},  # rows of many stretches
        {"train_rows": 5, "held_out_rows": 2, "out_of_domain": None, "seed": 1},
    ],
)
def test_a_pipeline_writes_the_same_bytes(passages, tokenizer, tmp_path, changes):
    write_sources(tmp_path, passages)
    config = make_config(tmp_path, **changes)
    figures = data.build_corpus(config, tokenizer, tmp_path / "alone")
    write = on_beam.writer(RUNNER)
    assert data.build_corpus(config, tokenizer, tmp_path / "beam", write=write) == figures
    assert files_of(tmp_path / "beam") == files_of(tmp_path / "alone")


def test_rows_of_many_shards_are_the_same_wherever_these_end(
    passages, tokenizer, tmp_path, monkeypatch
):
    for bound, size in (("min_shard_size", 500), ("max_shard_size", 3000)):
        monkeypatch.setattr(shard_utils.ShardConfig, bound, size)
    write_sources(tmp_path, passages)
    config = make_config(tmp_path, out_of_domain=None)
    figures = data.build_corpus(config, tokenizer, tmp_path / "alone")
    write = on_beam.writer(RUNNER)
    assert data.build_corpus(config, tokenizer, tmp_path / "beam", write=write) == figures
    assert len(list((tmp_path / "beam").rglob("*train.array_record*"))) > 4
    for split in ("train", "held_out"):
        made, expected = (data.open_corpus(tmp_path / place, split) for place in ("beam", "alone"))
        assert len(made) == len(expected) > 5
        for one, other in zip(made, expected):
            assert one["row_id"] == other["row_id"]
            assert one["key"] == other["key"] == data.row_key(one["tokens"], one["segment_ids"])


def test_workers_of_their_own_write_the_same_bytes(passages, tokenizer, tmp_path):
    write_sources(tmp_path, passages)
    config = make_config(tmp_path)
    data.build_corpus(config, tokenizer, tmp_path / "alone")
    write = on_beam.writer(
        "DirectRunner", ["direct_num_workers=2", "direct_running_mode=multi_processing"]
    )
    data.build_corpus(config, tokenizer, tmp_path / "beam", write=write)
    assert files_of(tmp_path / "beam") == files_of(tmp_path / "alone")


@pytest.fixture
def bucket(monkeypatch):
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setattr(
        backend._FileSystemSpecBackend, "_get_filesystem", lambda self, name: Bucket()
    )
    return epath.Path("gs://bucket")


def test_a_run_begins_in_a_bucket_and_goes_on_where_it_is_mounted(passages, tmp_path, bucket):
    write_sources(bucket, passages)
    settings = [f"--set=corpus.source={bucket / 'in'}", f"--set=corpus.out_of_domain={bucket}/out"]
    settings += ["--set=tokenizer.vocab_size=330", "--set=corpus.held_out_fraction=0.2"]
    command = ["corpus", TINY, *settings, "--out"]
    assert cli.main([*command, str(bucket / "run"), "--runner", RUNNER]) == 0
    assert not (bucket / "run" / "corpus" / ".beam").exists()
    mounted = {name: file.getvalue() for name, file in Bucket.store.items() if "/run/" in name}
    for name, content in mounted.items():
        path = tmp_path / "mount" / name.partition("/run/")[2]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    assert cli.main([*command, str(tmp_path / "alone")]) == 0
    files, expected = files_of(tmp_path / "mount"), files_of(tmp_path / "alone")
    assert files.keys() | {".lock"} == expected.keys()
    differ = {name for name in files if files[name] != expected[name]}
    assert differ == {"corpus/manifest.json"}  # when, and how long it took

    assert cli.main([*command, str(tmp_path / "mount")]) == 0  # done before
    assert files_of(tmp_path / "mount")["corpus/manifest.json"] == files["corpus/manifest.json"]
    tokenizer = data.load_tokenizer(tmp_path / "mount" / "corpus")
    assert len(data.open_corpus(tmp_path / "mount" / "corpus", "train", tokenizer=tokenizer)) > 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"passage": "x"}\n{"text": "x"}\n{', r"a\.jsonl: line 2: no text in the field 'passage'"),
        ('{"passage": "x"}', r"a\.jsonl: too few passages \(1 in all\), none is left for"),
        ("", r"a\.jsonl: too few passages \(0 in all\), none is left for train"),
    ],
)
def test_wrong_texts_are_one_clear_line(tokenizer, tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    config = make_config(tmp_path, source=str(tmp_path / "a.jsonl"), out_of_domain=None)
    with pytest.raises(InputError, match=message) as caught:
        data.build_corpus(config, tokenizer, tmp_path / "beam", write=on_beam.writer(RUNNER))
    assert "\n" not in str(caught.value)
    assert files_of(tmp_path / "beam") == {}


def test_absent_texts_are_told_before_the_pipeline(tokenizer, tmp_path):
    config = make_config(tmp_path)
    with pytest.raises(InputError, match="in: no such file"):
        data.build_corpus(config, tokenizer, tmp_path / "beam", write=on_beam.writer(RUNNER))


def test_beam_knows_the_runners_and_options_of_the_readme():
    text = README.read_text().replace("\\\n", " ")
    commands = [line for line in text.splitlines() if line.strip().startswith(".venv-beam/bin/")]
    for command in commands:
        options = cli._parser().parse_args(shlex.split(command)[1:])
        on_beam.writer(*options.runner[:1], options.runner[1:])
    assert [options.runner[0]] == ["DataflowRunner"]
    local = re.search(r"`--runner (DirectRunner [^`]*)`", text)
    on_beam.writer("DirectRunner", local[1].split()[1:])


def test_wrong_runners_and_options_are_refused():
    with pytest.raises(InputError, match="runner: Unexpected pipeline runner: SlowRunner"):
        on_beam.writer("SlowRunner")
    with pytest.raises(InputError, match="runner options: Beam knows no regoin"):
        on_beam.writer(RUNNER, ["regoin=x", "direct_num_workers=2"])
