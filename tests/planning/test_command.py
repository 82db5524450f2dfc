import io
import json
import pathlib
import re
import typing

import pytest
import rich.console

from distill_jax import cli, planning
from distill_jax.artifacts import InputError
from distill_jax.models.llama import Remat
from distill_jax.parallel import MeshConfig, Topology
from distill_jax.planning import compiling, picture, show, worker
from distill_jax.planning.program import Choice

from .test_compiling import TINY, Machine, a_report

CONFIG = str(pathlib.Path(TINY).absolute())


def rendered(renderable):
    console = rich.console.Console(width=200, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_a_report_is_shown_with_everything_it_says():
    gather = {"count": 7, "bytes": 3e6, "seconds": 0.004, "waits": 0.001}
    one = {"name": "f.1", "kind": "all-gather", "runs": 7, "seconds": 0.004, "waits": 0.001,
           "scope": "jit(step)/jvp(head)/while/body/dot", "detail": "bf16[8] over 16"}  # fmt: skip
    report = a_report(
        hbm=8e9,
        memory={"parameters": 1.25e9},
        alive={"attention": 2.5e9},
        largest=[(5e8, "f32[9,9] jit(step)/mlp/dot")],
        parts={"attention": 0.08, "other": 0.02},
        collectives={"all-gather": gather},
        heaviest=[one],
        travels=[one],
        assumptions=["clock 1.5 GHz"],
    )
    text = rendered(show.show_report(report, price=2.0))
    for words in (
        "distill on v5e:4x4, fsdp 16, batch 1 (16 rows), remat none",
        "fits: 8.00 GB of HBM a chip; the peak is 6%",
        "1.250",
        "2.500",
        "0.500  f32[9,9] mlp/dot",
        "all-gather bf16[8] over 16  jvp(head)/dot",
        "80.0",
        "40.0%",
        "tokens/s/chip",
        "clock 1.5 GHz",
        "Only hardware can show",
        "dollars, at 2 a chip and hour",
    ):
        assert words in text, words
    # 1e6 tokens at 1000 a tenth of a second are 100 s on 16 chips
    assert re.search(r"chip-hours +0\s", text)
    assert report.chip_hours == pytest.approx(100 * 16 / 3600)


def test_refusals_and_crashes_are_shown():
    refused = a_report(fits=False, step=None, mfu=None, problem="it needs 20.00 GB")
    assert "does not fit: it needs 20.00 GB" in rendered(show.show_report(refused, None))
    crashed = a_report(fits=False, hbm=None, step=None, mfu=None, problem="it crashed (SIGSEGV)")
    text = rendered(show.show_report(crashed, None))
    assert "nobody knows whether it fits: it crashed (SIGSEGV)" in text
    best = a_report(batch=2)
    table = rendered(show.show_choices([refused, crashed, best], best, "title", 1.0))
    assert "1.00 too much" in table
    assert len(re.findall(r"\*", table)) == 1


def test_the_picture_is_drawn(tmp_path):
    reports = [
        a_report(batch=batch, remat=remat, hbm=batch * 5e9, fits=batch < 4)
        for batch in (1, 2, 4)
        for remat in ("none", "full")
    ]
    picture.plot_memory([*reports, a_report(hbm=None, fits=False)], tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data=16", MeshConfig(data=16)),
        ("data=4,fsdp=2,tensor=2", MeshConfig(data=4, fsdp=2, tensor=2)),
        ("fsdp=-1,tensor=4", MeshConfig(tensor=4)),
    ],
)
def test_meshes_are_read(text, expected):
    assert planning.parse_mesh(text) == expected


BAD_MESHES = ["16x16", "data:4", "data=4;fsdp=2", "data=", "model=4", "data=2,data=4", ""]


@pytest.mark.parametrize("text", BAD_MESHES)
def test_other_meshes_are_refused(text):
    with pytest.raises(InputError, match="--mesh"):
        planning.parse_mesh(text)


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """The command in an empty directory, with answers of a made-up slice."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compiling, "answer", made := Machine())
    monkeypatch.setattr("distill_jax.planning.command.answer", made)
    return made


def run(capsys, *options):
    status = cli.main(["compile", CONFIG, "--set", "size=test", "--topology", "v5e:4x4", *options])
    printed = capsys.readouterr()
    return status, json.loads(printed.out.splitlines()[-1]) if "--json" in options else printed.out


def test_one_choice_ends_in_one_line(compiler, capsys, tmp_path):
    status, line = run(capsys, "--batch", "2", "--price", "1.5", "--json")
    assert status == 0
    assert line["fits"] is True
    assert line["hbm_gb"] == 16.0
    # 1e6 tokens, 2000 in 0.1 s: 50 s of 16 chips
    assert line["dollars"] == pytest.approx(1.5 * 16 * 50 / 3600)
    assert compiler.asked == [(None, 2, "v5e:4x4")]
    assert list(tmp_path.iterdir()) == []
    assert "reports" not in line


def test_what_does_not_fit_says_what_would(compiler, capsys):
    status, line = run(capsys, "--batch", "4", "--json")
    assert status == 0
    assert line["fits"] is False
    found = [(r["remat"], r["batch"], r["topology"]) for r in line["would_fit"]]
    assert found == [("full", 4, "v5e:4x4"), ("none", 2, "v5e:4x4"), ("none", 2, "v5e:4x8")]
    status, text = run(capsys, "--batch", "4")
    assert "this would fit" in text


def test_several_choices_are_a_sweep_with_a_picture(compiler, capsys, tmp_path):
    status, line = run(capsys, "--batch", "1", "2", "4", "--remat", "dots", "full", "--json")
    assert status == 0
    assert [(r["remat"], r["batch"]) for r in line["reports"]] == [
        ("dots", 1), ("dots", 2), ("dots", 4), ("full", 1), ("full", 2), ("full", 4)
    ]  # fmt: skip
    # as fast as dots with 4 rows, which fill the memory
    assert (line["remat"], line["batch"]) == ("full", 4)
    picture = tmp_path / "runs" / "tiny-test" / "compile" / "distill-v5e-4x4.png"
    assert picture.exists()
    status, text = run(capsys, "--sweep")
    assert "* recommended" in text
    assert {remat for remat, _, _ in compiler.asked} == set(typing.get_args(Remat))


def test_without_the_compiler_one_line_says_how_to_get_it(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("distill_jax.parallel.topology.find_spec", lambda name: None)
    command = ["compile", CONFIG, "--set", "size=test", "--topology", "v5e:4x4"]
    assert cli.main(command) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "pip install 'jax[tpu]'" in said[0]


def test_a_crash_of_the_compiler_is_an_answer(monkeypatch):
    """The child is another program that dies as a compiler would."""
    question = planning.Question(config=TINY, overrides=("size=test",))
    asked = (question, Choice(), Topology.parse("v5e:4x4"), 0)
    monkeypatch.setattr(worker, "COMMAND", ("sh", "-c", "kill -SEGV $$"))
    assert worker.compile_apart(*asked) == "the compiler crashed (SIGSEGV)"
    failing = "echo INTERNAL: no such kernel >&2; exit 3"
    monkeypatch.setattr(worker, "COMMAND", ("sh", "-c", failing))
    assert worker.compile_apart(*asked) == "the compiler failed (INTERNAL: no such kernel)"
