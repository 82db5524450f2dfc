"""Memory against batch as a picture."""

import os
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from etils import epath
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from distill_jax.planning.report import Report
from distill_jax.planning.show import describe_mesh

_COLOURS = ("#0a6ebd", "#c2571a", "#2f855a", "#8250a0", "#59616b", "#b8860b")
_MARKERS = "osD^vP"
_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.parse_math": False,
    "grid.color": "#e4e7eb",
    "legend.frameon": False,
}


def plot_memory(reports: Sequence[Report], path: str | os.PathLike[str]) -> None:
    """Writes a PNG: HBM a chip against rows at a time, a line for each mesh and remat.

    What does not fit is drawn hollow.
    """
    lines: dict[str, list[Report]] = {}
    for report in reports:
        if report.hbm is not None:
            label = f"{describe_mesh(report)}, remat {report.remat}"
            lines.setdefault(label, []).append(report)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
        axes = figure.add_subplot(
            title=f"{reports[0].program} on {reports[0].topology}",
            xlabel="rows at a time on each device",
            ylabel="HBM a chip, GB",
        )
        for place, (label, line) in enumerate(lines.items()):
            colour, marker = _COLOURS[place % 6], _MARKERS[place % 6]
            line = sorted(line, key=lambda report: report.batch)
            batches = [report.batch for report in line]
            sizes = [(report.hbm or 0.0) / 1e9 for report in line]
            axes.plot(batches, sizes, f"{marker}-", color=colour, label=label)
            refused = [report for report in line if not report.fits]
            axes.plot(
                [report.batch for report in refused],
                [(report.hbm or 0.0) / 1e9 for report in refused],
                marker,
                color="white",
                markeredgecolor=colour,
                zorder=3,
            )
        available = reports[0].available / 1e9
        axes.axhline(available, color="#59616b", linestyle="--", linewidth=1)
        axes.annotate(f"{available:.1f} GB are there", (0, available), (4, 4), fontsize=9,
                      xycoords=("axes fraction", "data"), textcoords="offset points")  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.legend(fontsize=9)
        with epath.Path(path).open("wb") as file:
            FigureCanvasAgg(figure).print_png(file)
