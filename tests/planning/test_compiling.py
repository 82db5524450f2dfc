import dataclasses
import pathlib
import typing

import jax
import pytest

from distill_jax import planning
from distill_jax.artifacts import InputError
from distill_jax.models.llama import Remat
from distill_jax.parallel import MeshConfig, Topology
from distill_jax.planning import cache, compiling, worker
from distill_jax.recipe import load_recipe

TINY = str(pathlib.Path(__file__).parents[2] / "configs" / "tiny.py")
V5E = Topology.parse("v5e:4x4")


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(TINY, ["size=test"])


def a_report(**changes):
    defaults = {
        "program": "distill",
        "topology": "v5e:4x4",
        "mesh": {"data": 1, "fsdp": 16, "tensor": 1},
        "chips": 16,
        "batch": 1,
        "rows": 16,
        "remat": "none",
        "fits": True,
        "hbm": 1e9,
        "peak": 1e9,
        "available": 16e9,
        "memory": {},
        "flops": 1e12,
        "tokens": 1000,
        "total_tokens": 1e6,
        "step": 0.1,
        "mfu": 0.4,
    }
    return planning.Report(**(defaults | changes))


class Machine:
    """Answers as a slice would on which `batch * {none 8, dots 4, full 1} GB / chips * 16` fit."""

    weights = {"none": 8e9, "dots": 4e9, "attention": 2e9, "full": 1e9}  # noqa: RUF012

    tokens = 1000

    def __init__(self, seconds=lambda choice: 0.1):
        self.asked, self.seconds = [], seconds

    def __call__(self, question, choice, topology):
        self.asked.append((choice.remat, choice.batch, str(topology)))
        if choice.mesh and choice.mesh.data == 3:
            raise InputError("does not arrange")
        remat, batch = choice.remat or "none", choice.batch or 1
        hbm = batch * self.weights[remat] * 16 / topology.chips
        hbm /= choice.mesh.sequence if choice.mesh else 1
        mesh = dataclasses.asdict(choice.mesh) if choice.mesh else {}
        return [
            a_report(
                topology=str(topology),
                chips=topology.chips,
                batch=batch,
                remat=remat,
                hbm=hbm,
                mesh={axis: size for axis, size in mesh.items() if size is not None},
                fits=hbm <= 16e9,
                tokens=self.tokens * batch,
                rows=batch,
                step=self.seconds(choice),
            )
        ]


@pytest.fixture
def machine(monkeypatch):
    made = Machine()
    monkeypatch.setattr(compiling, "answer", made)
    return made


@pytest.fixture
def question():
    return planning.Question(config=TINY, overrides=("size=test",))


def test_what_would_fit_is_found_by_trying(machine, question):
    refused = a_report(batch=4, remat="none", fits=False, hbm=32e9)
    found = planning.would_fit(question, V5E, refused)
    assert [(r.remat, r.batch, r.topology) for r in found] == [
        ("full", 4, "v5e:4x4"),
        ("none", 2, "v5e:4x4"),
        ("none", 2, "v5e:4x8"),  # the same rows on twice as many chips
    ]
    assert all(report.fits for report in found)
    assert machine.asked == [
        ("full", 4, "v5e:4x4"),
        ("none", 2, "v5e:4x4"),
        ("none", 2, "v5e:4x8"),
    ]


def test_kinds_without_anything_that_fits_are_left_out(machine, question):
    refused = a_report(batch=64, remat="full", fits=False, hbm=64e9)
    found = planning.would_fit(question, V5E, refused)
    assert [(r.remat, r.batch, r.topology) for r in found] == [
        ("full", 16, "v5e:4x4"),
        ("full", 32, "v5e:4x8"),
    ]
    writing = dataclasses.replace(question, stage="targets")
    machine.asked.clear()
    planning.would_fit(writing, V5E, a_report(batch=2, fits=False))
    assert {remat for remat, _, _ in machine.asked} == {"none"}  # there is nothing to recompute


def test_a_row_that_does_not_fit_is_shared(machine, question, monkeypatch):
    monkeypatch.setattr(machine, "weights", {"none": 8e9, "full": 40e9})
    refused = a_report(batch=1, remat="full", fits=False, hbm=40e9)
    shared, larger = planning.would_fit(question, V5E, refused)
    assert (shared.topology, shared.batch) == ("v5e:4x4", 1)
    assert (shared.mesh["fsdp"], shared.mesh["sequence"]) == (4, 4)
    assert (larger.topology, larger.mesh["sequence"]) == ("v5e:8x8", 1)
    # Only what reads tokens one by one can, and only where fewer rows cannot help.
    for stage, batch in (("dpo", 1), ("distill", 2)):
        other = dataclasses.replace(question, stage=stage)
        found = planning.would_fit(other, V5E, a_report(batch=batch, remat="full", fits=False))
        assert not [report for report in found if report.mesh["sequence"] > 1]


def test_what_reads_no_rows_is_not_tried_with_fewer(machine, question):
    pruning = dataclasses.replace(question, stage="prune")
    planning.would_fit(pruning, V5E, a_report(batch=4, fits=False, tokens=0))
    assert machine.asked == [("none", 2, "v5e:4x8")]


def test_texts_of_a_sweep_have_names_of_their_own(question):
    def name(choice):
        (program,) = planning.stage_programs(
            question.recipe, "distill", choice, jax.devices(), teacher=None
        )
        return worker.text_file(program, V5E)

    choices = [
        planning.Choice(),
        planning.Choice(batch=2),
        planning.Choice(batch=2, remat="full"),
        planning.Choice(batch=2, mesh=MeshConfig(data=2)),
    ]
    names = list(map(name, choices))
    assert names[0] == "distill-v5e-4x4-data1-fsdp8-fsdp_minor1-sequence1-tensor1-batch1-none.hlo"
    assert len(set(names)) == len(choices)


def test_a_sweep_stops_where_it_does_not_fit_or_gains_nothing(monkeypatch, question):
    def seconds(choice):  # a larger batch gains until 4 rows; dots cost, full more
        rows = max(choice.batch, 4)
        return 0.01 * rows * {"none": 1.0, "dots": 1.1}.get(choice.remat, 1.3)

    machine = Machine(seconds)
    monkeypatch.setattr(compiling, "answer", machine)
    reports = planning.sweep(question, V5E, meshes=[MeshConfig(), MeshConfig(data=3)])
    tried = {
        remat: [r.batch for r in reports if r.remat == remat] for remat in typing.get_args(Remat)
    }
    assert tried.pop("none") == [1, 2, 4]
    assert set(map(tuple, tried.values())) == {(1, 2, 4, 8)}
    assert [r.fits for r in reports if r.remat == "none"] == [True, True, False]
    best = planning.recommended(reports)
    # none: 2 rows in 40 ms, and 16 of 16 GB; dots: 4 in 44 ms, but all of the memory
    assert (best.remat, best.batch) == ("full", 4)


def test_a_sweep_without_a_backward_pass_asks_for_no_remat(machine, question):
    writing = dataclasses.replace(question, stage="targets")
    reports = planning.sweep(writing, V5E, batches=[1], remats=["dots", "full"], meshes=[None])
    assert [(report.remat, report.batch) for report in reports] == [("none", 1)]


def test_a_sweep_in_which_nothing_can_run_says_why(machine, question):
    with pytest.raises(InputError, match="does not arrange"):
        planning.sweep(question, V5E, meshes=[MeshConfig(data=3)])


def test_recommended_is_fast_then_small_and_leaves_room():
    fast = a_report(step=0.1000, hbm=9e9)
    nearly = a_report(step=0.1005, hbm=5e9)
    slow = a_report(step=0.2, hbm=1e9)
    full = a_report(step=0.05, hbm=15.9e9)
    refused = a_report(step=None, fits=False, hbm=20e9)
    assert planning.recommended([fast, slow, nearly, full, refused]) is nearly
    assert planning.recommended([full, refused]) is full
    assert planning.recommended([refused]) is None


@pytest.mark.parametrize(
    ("gigabytes", "tokens", "stage", "shared"),
    [
        (40.0, 1000, "distill", {2, 4, 8}),  # of which 20 GB do not fit, and 10 do
        (1.0, 2**14, "on-policy", {2, 4, 8}),
        (1.0, 2**14, "targets", {2, 4, 8}),
        (1.0, 1000, "distill", set()),
        (40.0, 1000, "dpo", set()),
    ],
)
def test_a_sweep_shares_rows_that_are_long_or_do_not_fit(
    machine, question, monkeypatch, gigabytes, tokens, stage, shared
):
    monkeypatch.setattr(machine, "weights", dict.fromkeys(("none", "full"), gigabytes * 1e9))
    monkeypatch.setattr(machine, "tokens", tokens)
    asked = dataclasses.replace(question, stage=stage)
    found = planning.sweep(asked, V5E, batches=[1], remats=["full"])
    meshes = [report.mesh for report in found if report.mesh["sequence"] > 1]
    assert {mesh["sequence"] for mesh in meshes} == shared
    assert all(mesh["fsdp"] * mesh["sequence"] == 16 for mesh in meshes)
    if shared and gigabytes == 40:
        assert planning.recommended(found).mesh["sequence"] in (4, 8)
    # Whoever names meshes gets those.
    named = planning.sweep(asked, V5E, batches=[1], remats=["full"], meshes=[MeshConfig()])
    assert len(named) == 1


def test_usual_meshes_arrange_all_chips():
    for name in ("v5e:16x16", "v5e:4x4", "v5p:4x4x8", "v5e:1x1", "v6e:1x2"):
        topology = Topology.parse(name)
        for mesh in compiling.usual_meshes(topology):
            assert topology.chips % (mesh.data * mesh.tensor) == 0
    assert MeshConfig(data=16) in compiling.usual_meshes(Topology.parse("v5e:16x16"))


def test_the_cache_gives_back_and_tells_apart(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_JAX_CACHE", str(tmp_path))
    choice = planning.Choice(batch=2)
    other = load_recipe(TINY, ["size=test", "distill.hard_weight=0.2"])
    names = {
        cache.key(recipe, "distill", choice, V5E),
        cache.key(recipe, "sft", choice, V5E),
        cache.key(recipe, "distill", planning.Choice(batch=4), V5E),
        cache.key(recipe, "distill", planning.Choice(batch=2, mesh=MeshConfig(data=2)), V5E),
        cache.key(recipe, "distill", choice, Topology.parse("v5e:4x8")),
        cache.key(other, "distill", choice, V5E),
        cache.key(recipe, "distill", choice, V5E, "another teacher"),
    }
    assert len(names) == 7
    name = cache.key(recipe, "distill", choice, V5E)
    assert name in names
    monkeypatch.setattr(cache, "_versions", lambda: {"code": "other"})
    assert cache.key(recipe, "distill", choice, V5E) not in names
    assert cache.read(name) is None
    reports = [a_report(), a_report(fits=False, largest=[[1e9, "x"]])]
    cache.write(name, reports)
    assert [report.line(1.0) for report in cache.read(name)] == [r.line(1.0) for r in reports]
    (tmp_path / "compiled" / f"{name}.json").write_text('[{"of": "another format"}]')
    assert cache.read(name) is None
    (tmp_path / "compiled" / f"{name}.json").write_text("torn")
    assert cache.read(name) is None


def test_versions_are_of_code_and_compilers():
    versions = cache._versions()
    assert versions["jax"]
    assert len(versions["code"]) == 16
