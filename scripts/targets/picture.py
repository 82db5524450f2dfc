"""Draws what `quality` measures."""

import pathlib
import sys
from collections.abc import Mapping
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pictures import BLUE, GREEN, INK, ORANGE, QUIET, SKY, panels

_LINES = {
    "top-k, renormalised": (ORANGE, "-", "s"),
    "top-k and a bucket": (GREEN, "-", "s"),
    "random sampling": (INK, "-", "o"),
    "threshold, K ids for each token": (SKY, "-", "o"),
    "threshold, one τ": (BLUE, "-", "o"),
}
_TOP_K_ALONE, _TOP_K, _RANDOM, _FIXED, _THRESHOLD = _LINES


def draw(rows: list[Mapping[str, Any]], subject: str) -> Figure:
    """Three panels over the rows of one distribution; `subject` says in a few words of which."""
    figure, (by_ids, by_bytes, bias) = panels(3, 5.0)
    _draw(by_ids, rows, "ids", "error")
    _draw(by_bytes, rows, "bytes", "error")
    _draw(bias, rows, "ids", "mean_error")
    by_ids.set(title="Error of a token's gradient", xlabel="ids a token")
    by_ids.set_ylabel("mean of |w − p|²")
    by_bytes.set(title="The same, by its price", xlabel="bytes a token")
    by_bytes.sharey(by_ids)
    for axes in (by_ids, by_bytes):
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    bias.set(title="What does not average out", xlabel="ids a token")
    bias.set_ylabel(f"|mean of w − p|² over {rows[0]['tokens']:,} tokens")
    handles, labels = by_ids.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=11)
    figure.suptitle(subject, x=0.01, ha="left", fontsize=12, color=QUIET)
    return figure


def _draw(axes: Axes, rows: list[Mapping[str, Any]], across: str, up: str) -> None:
    for name, (colour, line, marker) in _LINES.items():
        points = sorted((row[across], row[up]) for row in rows if _name(row) == name)
        if points:
            axes.plot(*zip(*points), line, color=colour, marker=marker, markersize=5, label=name)
    axes.set_yscale("log")
    axes.set_xlim(left=0)


def _name(row: Mapping[str, Any]) -> str:
    scheme = row["scheme"]
    if scheme["name"] == "top_k":
        return _TOP_K_ALONE if row["alone"] else _TOP_K
    if scheme["name"] == "random_sampling":
        return _RANDOM
    return _FIXED if scheme["tau"] is None else _THRESHOLD
