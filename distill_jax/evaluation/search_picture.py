"""What a search for a shape found, as a picture."""

import os
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from etils import epath
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from distill_jax import pruning

_INK, _QUIET, _GREY, _BLUE = "#1b1f24", "#59616b", "#cdd2d9", "#0a6ebd"
_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": _QUIET,
    "axes.edgecolor": _GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": _INK,
    "text.parse_math": False,
    "grid.color": "#e4e7eb",
    "xtick.labelcolor": _QUIET,
    "ytick.labelcolor": _QUIET,
    "legend.frameon": False,
}
_LABELS = {"parameters": "parameters", "decode_bytes": "bytes read for a decoded token"}


def plot_search(
    candidates: Sequence[pruning.Candidate],
    cost: pruning.Cost,
    path: str | os.PathLike[str],
) -> None:
    """Writes a PNG: loss against cost with the Pareto front, and which width at which depth.

    Args:
      candidates: of `pruning.search`.
      cost: what their costs count.
      path: the file.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(12, 5), dpi=110, layout="constrained")
        left, right = figure.subplots(1, 2)
        _loss_against_cost(left, candidates, cost)
        _width_against_depth(figure, right, candidates)
        with epath.Path(path).open("wb") as file:
            FigureCanvasAgg(figure).print_png(file)


def _loss_against_cost(
    axes: Axes, candidates: Sequence[pruning.Candidate], cost: pruning.Cost
) -> None:
    front = pruning.pareto(candidates)
    axes.set_title("What a size can buy")
    axes.scatter([c.cost for c in candidates], [c.loss for c in candidates], s=18, color=_GREY)
    axes.plot(
        [c.cost for c in front],
        [c.loss for c in front],
        "o-",
        color=_BLUE,
        markersize=5,
        label="none both smaller and better",
    )
    best = min(candidates, key=lambda c: c.loss)
    shape = best.shape
    text = f"{shape.layers} layers, {shape.embed} wide, {shape.mlp} neurons"
    axes.annotate(
        text,
        (best.cost, best.loss),
        xytext=(-8, -14),
        textcoords="offset points",
        ha="right",
        color=_BLUE,
        annotation_clip=False,
    )
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel(_LABELS[cost])
    axes.set_ylabel("loss on calibration rows, nats")
    axes.margins(y=0.12)
    axes.grid(axis="y")
    axes.legend(loc="upper right")


def _width_against_depth(
    figure: Figure, axes: Axes, candidates: Sequence[pruning.Candidate]
) -> None:
    """The best shape of each depth and width, by colour; of shapes that cost about the most."""
    most = max(candidate.cost for candidate in candidates)
    best: dict[tuple[int, int], float] = {}
    for candidate in candidates:
        if candidate.cost < 0.9 * most:
            continue
        place = candidate.shape.layers, candidate.shape.embed
        best[place] = min(best.get(place, candidate.loss), candidate.loss)
    axes.set_title("Width against depth, at the largest cost")
    dots = axes.scatter(
        [layers for layers, _ in best],
        [embed for _, embed in best],
        c=list(best.values()),
        cmap="viridis_r",
        s=160,
    )
    winner = min(best, key=lambda place: best[place])
    axes.scatter(*winner, s=330, facecolors="none", edgecolors=_INK, linewidths=1.6)
    figure.colorbar(dots, ax=axes, label="least loss, nats").outline.set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layers")
    axes.set_ylabel("hidden channels")
    axes.margins(0.12)
    axes.grid()
