"""Draws what `measure_posttraining` finds."""

import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pictures import BLUE, GREEN, INK, ORANGE, SKY, panels

Found = Mapping[str, Mapping[str, Sequence[float]]]
_STEPS = {
    "sft": "SFT",
    "sft-longer": "SFT,\nlonger",
    "rejection-sample": "rejection\nsampling",
    "dpo": "DPO",
    "dpo-without-nll": "DPO,\nno NLL",
}


def draw(found: Found) -> Figure:
    """Right answers of all models, and what DPO does to the answers of its pairs."""
    figure, (scores, falls) = panels(2, 4.2)
    _bars(scores, found, _STEPS, {"greedy": BLUE, "sampled": SKY})
    scores.set(title="Held-out questions right", ylim=(0, 1))
    before = found["rejection-sample"]
    changes = {
        name: {
            figure: [a - b for a, b in zip(found[name][figure], before[figure], strict=True)]
            for figure in ("chosen", "rejected")
        }
        for name in ("dpo", "dpo-without-nll")
    }
    _bars(falls, changes, _STEPS, {"chosen": GREEN, "rejected": ORANGE})
    falls.axhline(0, color=INK, linewidth=0.8)
    falls.set(title="What DPO does to log p of answers", ylabel="nats")
    return figure


def _bars(axes: Axes, found: Found, names: Mapping[str, str], figures: Mapping[str, str]) -> None:
    """A bar for each model and figure, and a dot for each seed."""
    shown, width = [name for name in names if name in found], 0.8 / len(figures)
    for place, (figure, colour) in enumerate(figures.items()):
        for x, name in enumerate(shown):
            values = found[name][figure]
            at = x + (place - (len(figures) - 1) / 2) * width
            label = figure.replace("_", "-") if x == 0 else None
            axes.bar(at, statistics.fmean(values), width * 0.92, color=colour, label=label)
            axes.plot([at] * len(values), values, ".", color=INK, markersize=4)
    axes.set_xticks(range(len(shown)), [names[name] for name in shown], fontsize=9)
    axes.legend(fontsize=10)
