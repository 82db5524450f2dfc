"""The cells of the pruning table: which process measures which, and what a cell leaves alone."""

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
    shares = [table.prune_table.share(wanted, f"{k}/{count}") for k in range(1, count + 1)]
    assert sum(map(len, shares)) == len(wanted)
    assert {cell for share in shares for cell in share} == set(wanted)
    shapes = [{(cell.shape, cell.cut) for cell in share} for share in shares]
    assert sum(map(len, shapes)) == len(set.union(*shapes))


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
