"""The cells of the pruning table: which process measures which, and what a cell leaves alone."""

import argparse
import dataclasses
import importlib
import pathlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny

from distill_jax import models

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def table():
    """The scripts' modules, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        names = ("prune_cells", "prune_table")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.mark.parametrize("count", [1, 3, 10, 40])
def test_processes_share_all_cells_and_no_shape(table, count):
    wanted = table.prune_cells.cells([15, 70], 2, 0)
    shares = [table.prune_table.share(wanted, k, count) for k in range(1, count + 1)]
    assert sum(map(len, shares)) == len(wanted)
    assert {cell for share in shares for cell in share} == set(wanted)
    shapes = [{(cell.shape, cell.cut) for cell in share} for share in shares]
    assert sum(map(len, shapes)) == len(set.union(*shapes))


@pytest.mark.parametrize("text", ["0/4", "5/4", "1/0"])
def test_a_share_is_one_of_as_many_as_there_are(table, text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"{text} is not K/N"):
        table.prune_table.part(text)


@pytest.mark.slow
def test_distilling_takes_nothing_from_the_whole_model(table, monkeypatch):
    """What no cut changed is one array in both, and a step takes the place of what it updates."""
    whole = tiny.model(dataclasses.replace(tiny.SOURCE, tied=True))
    before = jax.tree.map(np.array, whole.params)
    steps = [tiny.rows(4, seed=seed) for seed in range(3)]
    bench = object.__new__(table.prune_cells.Bench)
    bench.model = whole
    monkeypatch.setattr(bench, "rows", lambda *_: steps)
    cut = models.Model(
        whole.config, whole.params | {"final_norm": whole.params["final_norm"] * 2.0}
    )
    student = bench.distill(cut, tokens=3 * 4 * 512)
    jax.tree.map(np.testing.assert_array_equal, whole.params, before)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 0, student.params, before)
    assert all(jax.tree.leaves(moved))


def test_what_is_prepared_are_all_rows_that_cells_read(table, tmp_path, monkeypatch):
    """Else processes that share the work directory would write the same file at once."""
    bench = object.__new__(table.prune_cells.Bench)
    bench.work = tmp_path
    asked = []

    def rows(name, *_):
        asked.append(name)
        (tmp_path / f"{name}.npz").touch()
        return []

    monkeypatch.setattr(bench, "rows", rows)
    for name in ("scores", "layer_scores"):
        monkeypatch.setattr(bench, name, lambda *_: None)
    wanted = table.prune_cells.cells([30], 2, 4096)
    table.prune_table.prepare(bench, [c for c in wanted if c.repair == "in_sequence" and c.inner])
    assert {"calibration-0", "calibration-1", "held-out", "distill-2"} == set(asked)
