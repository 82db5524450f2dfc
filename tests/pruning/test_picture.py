import dataclasses
import io

import numpy as np
import pytest
import rich.console
import tiny

from distill_jax.pruning import draw, make_plan
from distill_jax.pruning.picture import strip


def lines(plan, width=80):
    console = rich.console.Console(file=io.StringIO(), width=width)
    console.print(draw(plan, width=width))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("kept", "size", "width", "picture"),
    [
        ([0, 2], 4, 8, "█·█·"),
        ([0, 1, 2], 4, 2, "█▒"),
        ([], 4, 2, "··"),
        (range(8), 8, 3, "███"),
        ([*range(1, 40), *range(40, 41), *range(80, 119)], 120, 3, "▓░▓"),
    ],
)
def test_strip(kept, size, width, picture):
    assert strip(np.array(kept, int), size, width) == picture


def test_every_axis_and_layer_is_drawn():
    target = dataclasses.replace(tiny.SOURCE, layers=2, embed=9, mlp=10, heads=4, kv_heads=2)
    plan = make_plan(tiny.random_scores(tiny.SOURCE), tiny.SOURCE, target)
    plan = dataclasses.replace(
        plan,
        layers=np.array([1, 3]),
        embed=np.delete(np.arange(12), [2, 5, 7]),
        kv_heads=np.array([[0, 3], [1, 2]]),
        heads=np.array([[0, 1, 6, 7], [2, 3, 4, 5]]),
        mlp=np.array([np.arange(10), np.arange(0, 20, 2)]),
    )
    shown = lines(plan)
    assert f"{tiny.SOURCE.parameters:,} -> {target.parameters:,} parameters" in shown[0]
    assert [line.split() for line in shown[2:8]] == [
        ["layers", "4", "2", "·█·█"],
        ["hidden", "channels", "12", "9", "██·██·█·████"],
        ["neurons", "a", "layer", "20", "10"],
        ["query", "heads", "a", "layer", "8", "4"],
        ["key/value", "heads", "a", "layer", "4", "2"],
        ["channels", "a", "head", "8", "8", "████████"],
    ]
    assert [line.split() for line in shown[9:13]] == [
        ["0", "cut"],
        ["1", "██", "··", "··", "██", "█" * 10 + "·" * 10],
        ["2", "cut"],
        ["3", "··", "██", "██", "··", "█·" * 10],
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_nothing_is_cut_off_at_the_edge(width):
    source = dataclasses.replace(tiny.SOURCE, embed=4096, mlp=14336, heads=128, kv_heads=8)
    target = dataclasses.replace(source, embed=2048, mlp=8192, heads=64, kv_heads=2)
    source_scores = tiny.random_scores(source)
    plan = make_plan(source_scores, source, dataclasses.replace(target, kv_heads=8))
    assert "…" not in "".join(lines(plan, width))


def test_merged_heads_are_told():
    target = dataclasses.replace(tiny.SOURCE, heads=6, kv_heads=2)
    plan = make_plan(tiny.random_scores(tiny.SOURCE), tiny.SOURCE, target, kv_choice="merge")
    assert "key/value heads are means of 2" in lines(plan)[-1]
