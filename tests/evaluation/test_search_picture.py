import dataclasses
import io

import matplotlib.image
import rich.console

from distill_jax import evaluation, models, pruning
from distill_jax.evaluation import search_picture


def candidate(cost, loss, repaired=None, **sizes):
    shape = dataclasses.replace(models.SMOLLM2_135M, **sizes)
    return pruning.Candidate(shape=shape, cost=cost, loss=loss, repaired_loss=repaired)


CANDIDATES = [
    candidate(100.0, 3.0, repaired=2.5, layers=20),
    candidate(99.0, 3.2, layers=25, embed=480),
    candidate(101.0, 3.5, layers=30, embed=400),
    candidate(60.0, 4.0, layers=10),
]


def test_the_table_stars_what_nothing_beats():
    console = rich.console.Console(file=io.StringIO(), width=100)
    console.print(evaluation.search_table(CANDIDATES))
    rows = [line for line in console.file.getvalue().splitlines() if "9/3" in line]
    cells = [[cell.strip() for cell in row.split("│")[1:-1]] for row in rows]
    assert [(row[0], row[2], row[6], row[7]) for row in cells] == [
        ("*", "20", "3.000", "2.500"),
        ("*", "25", "3.200", ""),
        ("", "30", "3.500", ""),
        ("*", "10", "4.000", ""),
    ]


def test_the_picture_is_a_png_with_something_on_it(tmp_path):
    search_picture.plot_search(CANDIDATES, "parameters", tmp_path / "search.png")
    picture = matplotlib.image.imread(tmp_path / "search.png")
    assert picture.shape[:2] == (550, 1320)
    assert picture.std() > 0.05
