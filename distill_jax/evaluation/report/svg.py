"""Matplotlib figures as inline SVG that takes its colours and font from the page.

A figure is drawn with stand-in colours, one for each CSS variable, which are replaced in the
text afterwards; so one drawing serves light and dark. The same figure gives the same bytes.
"""

import io
import re
from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

_VARIABLES = ("ink", "muted", "rule", "page", "keep", "cut", *(f"series-{i}" for i in range(8)))

COLOUR = {name: f"#0102{number:02x}" for number, name in enumerate(_VARIABLES)}
"""CSS variable -> the stand-in to draw with."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "distill_jax",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlecolor": COLOUR["ink"],
    "axes.titlepad": 10,
    "axes.labelsize": 11,
    "axes.labelcolor": COLOUR["muted"],
    "axes.edgecolor": COLOUR["rule"],
    "axes.facecolor": "none",
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "grid.color": COLOUR["rule"],
    "grid.linewidth": 0.8,
    "text.color": COLOUR["ink"],
    "xtick.color": COLOUR["rule"],
    "ytick.color": COLOUR["rule"],
    "xtick.labelcolor": COLOUR["muted"],
    "ytick.labelcolor": COLOUR["muted"],
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "lines.solid_capstyle": "round",
}

_DPI = 72  # an SVG's point is then a pixel


def style() -> AbstractContextManager[None]:
    """Context manager under which figures are drawn."""
    return mpl.rc_context(_STYLE)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that many pixels."""
    return Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, layout="constrained")


def to_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as one `<svg>` element; `name` keeps its ids apart from other figures'.

    Args:
      figure: drawn under `style`.
      name: letters, digits and hyphens.
      description: what a screen reader says, without markup.
    """
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(buffer, metadata=no_metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", text)
    for variable, stand_in in COLOUR.items():
        text = text.replace(stand_in, f"var(--{variable})")
    return re.sub(r"<svg\b", f'<svg role="img" aria-label="{description}"', text, count=1).strip()
