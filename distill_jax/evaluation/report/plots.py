"""The report's plots: what pruning measured and kept, and how the models learnt."""

import itertools
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from distill_jax.evaluation.report.contents import Curve, Cut, Panel
from distill_jax.evaluation.report.svg import COLOUR, new_figure, style, to_svg
from distill_jax.evaluation.report.tables import count_text

BUCKETS = 48
"""Columns of the neurons' heat map, and bars of the channels' plot."""

SERIES = 8
"""Curves told apart by colour and dash; later ones start again."""

DASHES = ("", "7 3", "2 3", "8 3 2 3", "12 4", "4 2", "1 2", "10 3 2 3 2 3")
"""Each series' dash pattern in pixels, since colour alone does not reach every reader."""

_COLOURMAP = mpl.colormaps["viridis"]
_LAYER_HEIGHT, _LEAST_HEIGHT, _MOST_HEIGHT = 13, 170, 620


def colour_stops(count: int = 6) -> list[str]:
    """CSS colours along the heat maps' scale, low to high."""
    scale = _kept_colour(np.linspace(0, 1, count))
    return [mpl.colors.to_hex((red, green, blue)) for red, green, blue, _ in scale]


def _kept_colour(score: Any) -> np.ndarray:
    # Without the ends of the colour map: those vanish on a dark or a light page.
    return np.asarray(_COLOURMAP(0.12 + 0.82 * np.asarray(score)))


def heat_image(scores: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """RGBA of a heat map in which what is kept has colour and what is cut is grey.

    Args:
      scores: [rows, columns] in 0..1.
      kept: the share of each cell that is kept, 0..1.
    """
    grey = np.full((*scores.shape, 4), 0.5)
    grey[..., 3] = 0.08 + 0.34 * scores
    share = kept[..., None]
    return share * _kept_colour(scores) + (1 - share) * grey


def kept_mask(
    shape: tuple[int, int], layers: Sequence[int], kept: Sequence[Sequence[int]]
) -> np.ndarray:
    """[L, units] of bool from one list of kept units for each kept layer."""
    mask = np.zeros(shape, bool)
    for layer, units in zip(layers, kept):
        mask[layer, list(units)] = True
    return mask


def bucket(values: np.ndarray, buckets: int) -> np.ndarray:
    """Means over at most `buckets` runs of nearly equal length along the last axis."""
    edges = np.linspace(0, values.shape[-1], min(buckets, values.shape[-1]) + 1).astype(int)
    return np.stack([values[..., a:b].mean(axis=-1) for a, b in itertools.pairwise(edges)], axis=-1)


def within_rows(scores: np.ndarray) -> np.ndarray:
    """Each row scaled so that its largest score is 1."""
    return scores / np.maximum(scores.max(axis=1, keepdims=True), np.finfo(float).tiny)


def cut_plots(cut: Cut) -> dict[str, str]:
    """SVG of "influence", "heads", "neurons" (one row a layer, all of one height), "channels"."""
    with style():
        return {
            "influence": _influence(cut),
            "heads": _heads(cut),
            "neurons": _neurons(cut),
            "channels": _channels(cut),
        }


def _layer_axes(cut: Cut, width: float, title: str, *, numbers: bool = True) -> tuple[Any, Axes]:
    layers = len(cut.block_influence)
    height = min(max(layers * _LAYER_HEIGHT + 66, _LEAST_HEIGHT), _MOST_HEIGHT)
    figure = new_figure(width, height)
    axes = figure.add_subplot(title=title)
    axes.set_ylim(layers - 0.5, -0.5)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.tick_params(length=0)
    if numbers:
        axes.set_ylabel("layer")
    return figure, axes


def _influence(cut: Cut) -> str:
    figure, axes = _layer_axes(cut, 270, "Block influence")
    influence = np.asarray(cut.block_influence, float)
    kept = np.isin(np.arange(len(influence)), cut.kept_layers)
    colours = [COLOUR["keep"] if keep else COLOUR["cut"] for keep in kept]
    axes.barh(np.arange(len(influence)), influence, height=0.74, color=colours)
    if (influence > 0).all() and influence.max() > 20 * np.median(influence):
        axes.set_xscale("log")
        _plain_log_ticks(axes.xaxis)
    axes.set_xlabel("1 − cos(stream in, stream out)")
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    text = f"Block influence of {len(kept)} layers, of which {kept.sum()} are kept"
    return to_svg(figure, "influence", text)


def _heat_map(axes: Axes, scores: np.ndarray, kept: np.ndarray) -> None:
    axes.imshow(heat_image(scores, kept), aspect="auto", interpolation="none")
    axes.hlines(
        np.arange(len(scores) - 1) + 0.5, -0.5, scores.shape[1] - 0.5, COLOUR["page"], linewidth=1
    )
    for spine in axes.spines.values():
        spine.set_visible(False)


def _heads(cut: Cut) -> str:
    figure, axes = _layer_axes(cut, 280, "Attention heads")
    scores = np.asarray(cut.heads, float)
    kept = kept_mask(scores.shape, cut.kept_layers, cut.kept_heads)
    _heat_map(axes, within_rows(scores), kept.astype(float))
    axes.vlines(
        np.arange(scores.shape[1] - 1) + 0.5, -0.5, len(scores) - 0.5, COLOUR["page"], linewidth=1
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    axes.set_xlabel("head")
    text = f"Importance of {scores.size} attention heads, of which {kept.sum()} are kept"
    return to_svg(figure, "heads", text)


def _neurons(cut: Cut) -> str:
    figure, axes = _layer_axes(cut, 470, "MLP neurons, most important first")
    scores = np.asarray(cut.neurons, float)
    kept = kept_mask(scores.shape, cut.kept_layers, cut.kept_neurons)
    order = np.argsort(-scores, axis=1, kind="stable")
    heights = within_rows(bucket(np.take_along_axis(scores, order, axis=1), BUCKETS))
    share = bucket(np.take_along_axis(kept, order, axis=1).astype(float), BUCKETS)
    # Two decades of a logarithm, since a few neurons tower over the rest.
    decades = np.log10(np.maximum(heights, 1e-2))
    _heat_map(axes, 1 + decades / 2, share)
    columns = min(BUCKETS, scores.shape[1])
    _count_ticks(axes, columns, scores.shape[1], offset=-0.5)
    axes.set_xlabel("rank of the neuron within its layer")
    text = f"Importance of {kept.size} MLP neurons, of which {kept.sum()} are kept"
    return to_svg(figure, "neurons", text)


def _channels(cut: Cut) -> str:
    figure = new_figure(430, 220)
    axes = figure.add_subplot(title="Embedding channels by importance")
    scores = np.asarray(cut.channels, float)
    order = np.argsort(-scores, kind="stable")
    kept = np.isin(order, cut.kept_channels)
    heights, share = bucket(scores[order], 2 * BUCKETS), bucket(kept.astype(float), 2 * BUCKETS)
    rank = np.arange(len(heights)) + 0.5
    axes.bar(rank, heights, width=0.86, color=COLOUR["cut"])
    axes.bar(rank, heights * share, width=0.86, color=COLOUR["keep"])
    if heights.min() > 0 and heights[0] > 8 * np.median(heights):
        axes.set_yscale("log")
        _plain_log_ticks(axes.yaxis)
    _count_ticks(axes, len(heights), len(scores), offset=0.0)
    axes.set_xlabel("rank of the channel")
    axes.set_ylabel("importance")
    axes.tick_params(length=0)
    axes.grid(axis="y")
    text = f"Importance of {len(scores)} embedding channels, of which {kept.sum()} are kept"
    return to_svg(figure, "channels", text)


def _count_ticks(axes: Axes, columns: int, units: int, offset: float) -> None:
    """Ticks that count units on an axis drawn in buckets."""
    counts = np.asarray(MaxNLocator(integer=True, nbins=5).tick_values(0, units))
    counts = counts[(counts >= 0) & (counts <= units)]
    axes.set_xticks(counts * columns / units + offset, [f"{int(count):,}" for count in counts])
    axes.set_xlim(offset, columns + offset)


def _plain_log_ticks(axis: Axis) -> None:
    """Labels such as 200: the usual ones are TeX, which text in an SVG would show as it is.

    Call it behind `set_xscale`, which sets ticks of its own.
    """
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def curve_plot(curves: Sequence[Curve], metric: str, name: str) -> str | None:
    """One panel: seeds as thin lines, their smoothed mean in bold. None if nobody logs `metric`."""
    shown = [
        (index, *common_steps(curve, metric))
        for index, curve in enumerate(curves)
        if _logged(curve, metric)
    ]
    if not shown:
        return None
    with style():
        figure, axes = _curve_axes("nats per token")
        means = [_draw(axes, *one) for one in shown]
        settled = max(mean[len(mean) // 10 :].max() for mean in means)
        lowest = min(values.min() for _, _, values in shown)
        # The first tenth, which falls from the sky, would flatten all that follows.
        margin = 0.06 * (settled - lowest) or 0.5
        axes.set_ylim(lowest - margin, settled + margin)
        axes.set_xlim(0, max(tokens[-1] for _, tokens, _ in shown))
        return to_svg(figure, name, f"{len(shown)} training curves")


def panel_plot(panel: Panel, name: str) -> str | None:
    """A panel's lines, drawn as those of `curve_plot`, whole. None if nothing of it was logged."""
    shown = [
        (index, label, *common_steps(panel.curve, metric))
        for index, (metric, label) in enumerate(panel.metrics)
        if _logged(panel.curve, metric)
    ]
    if not shown:
        return None
    with style():
        figure, axes = _curve_axes(panel.unit)
        for index, label, tokens, values in shown:
            _draw(axes, index, tokens, values, label)
        if len(shown) > 1:
            axes.legend(frameon=False, labelcolor=COLOUR["muted"])
        return to_svg(figure, name, f"training: {', '.join(label for _, label, *_ in shown)}")


def _logged(curve: Curve, metric: str) -> bool:
    return all(metric in run for run in curve.runs)


def _curve_axes(unit: str) -> tuple[Figure, Axes]:
    figure = new_figure(430, 260)
    axes = figure.add_subplot()
    axes.set_xlabel("training tokens")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count_text(value)))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.set_ylabel(unit)
    axes.tick_params(length=0)
    axes.grid(axis="y")
    return figure, axes


def _draw(
    axes: Axes, index: int, tokens: np.ndarray, values: np.ndarray, label: str | None = None
) -> np.ndarray:
    """Draws the runs [seeds, S] of a series, and their smoothed mean [S], which it returns."""
    colour = COLOUR[f"series-{index % SERIES}"]
    for seed in values:
        axes.plot(tokens, seed, color=colour, linewidth=0.8, alpha=0.28)
    mean = smooth(values.mean(axis=0))
    dashes = [float(dash) / 2 for dash in DASHES[index % SERIES].split()]
    pattern = (0, tuple(dashes)) if dashes else "solid"
    marker = "o" if len(tokens) == 1 else None
    options: dict[str, Any] = {
        "color": colour,
        "linestyle": pattern,
        "marker": marker,
        "label": label,
    }
    axes.plot(tokens, mean, linewidth=2.2, **options)
    return mean


def common_steps(curve: Curve, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [S], values [seeds, S]) at the token counts that all seeds logged."""
    tokens = np.asarray(
        sorted(set.intersection(*(set(run["tokens"]) for run in curve.runs))), float
    )
    values = [dict(zip(run["tokens"], run[metric], strict=True)) for run in curve.runs]
    return tokens, np.asarray([[seed[count] for count in tokens] for seed in values], float)


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over about a thirtieth of the curve, one-sided at its ends."""
    radius = len(values) // 60
    total = np.concatenate(([0.0], np.cumsum(values)))
    position = np.arange(len(values))
    first = np.maximum(position - radius, 0)
    last = np.minimum(position + radius, len(values) - 1) + 1
    return (total[last] - total[first]) / (last - first)
