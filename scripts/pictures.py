"""How the pictures look."""

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, QUIET, FAINT, GREY = "#1b1f24", "#59616b", "#e4e7eb", "#cdd2d9"
BLUE, SKY, ORANGE, GREEN = "#0a6ebd", "#8cc3ee", "#d9590f", "#15803d"
STYLE = {
    "figure.constrained_layout.wspace": 0.05,
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.labelcolor": QUIET,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": QUIET,
    "lines.linewidth": 2,
    "legend.frameon": False,
}


def panels(count: int, height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, side by side and in so many rows; height in inches."""
    pyplot.rcParams.update(STYLE)
    shape, size = (rows, count // rows), (13, height)
    figure, grid = pyplot.subplots(*shape, figsize=size, layout="constrained", squeeze=False)
    axes = [*grid.flat]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(axis="y", color=FAINT, linewidth=0.8)
        one.tick_params(which="both", length=0)
    return figure, axes
