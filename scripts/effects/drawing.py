"""Draws what `measure_posttraining` finds."""

import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import alignment
import distillation
from alignment import AGAIN, FRESH, LONGER, LOOSE, NO_NLL, STALE
from distillation import GIVEN_FORWARD, GIVEN_REVERSE, GKD, MINILLM, OWN_FORWARD, OWN_REVERSE
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pictures import BLUE, GREEN, INK, ORANGE, SKY, panels

from distill_jax.stages.context import REJECTION, SFT

Found = Mapping[str, Mapping[str, Sequence[float]]]
_STEPS = {
    SFT: "SFT",
    LONGER: "SFT,\nlonger",
    REJECTION: "rejection\nsampling",
    AGAIN: "twice",
    STALE: "DPO,\nold pairs",
    FRESH: "DPO",
    LOOSE: "DPO,\nloose",
    NO_NLL: "loose,\nno NLL",
}
_WAYS = {
    GIVEN_FORWARD: "forward\nKL, given",
    GIVEN_REVERSE: "reverse\nKL, given",
    OWN_FORWARD: "forward\nKL, own",
    OWN_REVERSE: "reverse\nKL, own",
    GKD: "GKD",
    MINILLM: "MiniLLM",
}


def draw(found: Mapping[str, Found]) -> Figure:
    """Right answers, what learning fresh pairs does to their answers, and how sure students are."""
    figure, axes = panels(4, 7.6, rows=2)
    scores, falls, taught, sure = axes
    of_alignment, of_students = found[alignment.NAME], found[distillation.NAME]
    _bars(scores, of_alignment, _STEPS, {"greedy": BLUE, "sampled": SKY})
    scores.set(title="Held-out questions right", ylim=(0, 1))
    before = of_alignment[REJECTION]
    changes = {
        name: {
            figure: [a - b for a, b in zip(of_alignment[name][figure], before[figure], strict=True)]
            for figure in ("chosen", "rejected")
        }
        for name in alignment.PAIRED[1:]
    }
    _bars(falls, changes, _STEPS, {"chosen": GREEN, "rejected": ORANGE})
    falls.axhline(0, color=INK, linewidth=0.8)
    falls.set(title="Change of log p of the fresh pairs", ylabel="nats")
    _bars(taught, of_students, _WAYS, {"greedy": BLUE, "sampled": SKY}, cut=True)
    taught.set(title="Right after distillation", ylim=(0.88, 1.0))
    taught.legend(fontsize=10, loc="upper right", ncols=2)
    _bars(sure, of_students, _WAYS, {"entropy": GREEN, "cross_entropy": ORANGE})
    sure.set(title="At the tokens of right answers", ylabel="nats a token")
    return figure


def _bars(
    axes: Axes,
    found: Found,
    names: Mapping[str, str],
    figures: Mapping[str, str],
    *,
    cut: bool = False,
) -> None:
    """A bar for each model and figure, a line where the axis is cut, and a dot for each seed."""
    shown, width = [name for name in names if name in found], 0.8 / len(figures)
    for place, (figure, colour) in enumerate(figures.items()):
        for x, name in enumerate(shown):
            values = found[name][figure]
            at = x + (place - (len(figures) - 1) / 2) * width
            label = figure.replace("_", "-") if x == 0 else None
            top = statistics.fmean(values)
            if cut:
                axes.hlines(top, at - width / 2, at + width / 2, colour, linewidth=5, label=label)
            else:
                axes.bar(at, top, width * 0.92, color=colour, label=label)
            axes.plot([at] * len(values), values, ".", color=INK, markersize=4)
    axes.set_xticks(range(len(shown)), [names[name] for name in shown], fontsize=9)
    axes.legend(fontsize=10)
