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


def panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels side by side; height in inches."""
    pyplot.rcParams.update(STYLE)
    figure, axes = pyplot.subplots(1, count, figsize=(13, height), layout="constrained")
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(axis="y", color=FAINT, linewidth=0.8)
        one.tick_params(which="both", length=0)
    return figure, list(axes)
