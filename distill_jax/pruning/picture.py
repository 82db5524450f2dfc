"""A plan as a picture for the terminal: what is kept, axis by axis and layer by layer."""

import itertools

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from distill_jax.pruning.plan import Plan

_SHADES = "·░▒▓█"
"""From nothing kept to everything."""

_SIZES = {
    "layers": "layers",
    "embed": "hidden channels",
    "mlp": "neurons a layer",
    "heads": "query heads a layer",
    "kv_heads": "key/value heads a layer",
    "head_dim": "channels a head",
}


def draw(plan: Plan, *, width: int = 80) -> RenderableType:
    """What `rich.print` shows of a plan.

    First the sizes; then one strip for each axis that all layers share; then a line for each layer
    of the source, with its query heads (a space between those of different key/value heads) and its
    neurons. A cell that stands for several indices is shaded by the share that is kept.

    Args:
      plan: what to draw.
      width: columns to draw in.
    """
    old, new = plan.source, plan.target
    share = new.parameters / old.parameters
    title = f"{old.parameters:,} -> {new.parameters:,} parameters ({share:.0%}), by {plan.method}"
    legend = f"{_SHADES[-1]} kept  {_SHADES[0]} cut"
    if plan.merged_kv_heads is not None:
        size = plan.merged_kv_heads.shape[-1]
        legend += f"; key/value heads are means of {size}"
    return Group(Text(title), _shared(plan, width), _layers(plan, width), Text(legend))


def strip(kept: np.ndarray, size: int, width: int) -> str:
    """`size` indices in at most `width` cells, each shaded by the share of it that is kept."""
    mask = np.zeros(size)
    mask[kept] = 1
    edges = np.linspace(0, size, min(size, width) + 1).astype(int)
    shares = [mask[a:b].mean() for a, b in itertools.pairwise(edges)]
    # Only what is wholly kept or cut is drawn so.
    return "".join(_SHADES[int(x * 4) if x in (0, 1) else 1 + int(x * 3)] for x in shares)


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=True, header_style="bold")
    for name in columns:
        table.add_column(name, no_wrap=True)
    return table


def _shared(plan: Plan, width: int) -> Table:
    """The sizes, and the strips of axes that are the same in all layers."""
    table = _table("", "of", "kept", "")
    for name, label in _SIZES.items():
        size, left = getattr(plan.source, name), getattr(plan.target, name)
        kept = getattr(plan, name)
        picture = strip(kept, size, width - 44) if kept.ndim == 1 else ""
        table.add_row(label, f"{size:,}", f"{left:,}", picture)
    return table


def _layers(plan: Plan, width: int) -> Table:
    """One line for each layer of the source."""
    source = plan.source
    each = source.heads // source.kv_heads
    cells = max(min(each, width // (2 * source.kv_heads) - 1), 1)
    room = max(width - 12 - (cells + 1) * source.kv_heads, 16)
    table = _table("layer", "query heads", "neurons")
    rank = {int(layer): i for i, layer in enumerate(plan.layers)}
    for layer in range(source.layers):
        if layer not in rank:
            table.add_row(str(layer), "cut", "", style="dim")
            continue
        heads, neurons = plan.heads[rank[layer]], plan.mlp[rank[layer]]
        groups = (heads[heads // each == k] % each for k in range(source.kv_heads))
        pictures = " ".join(strip(group, each, cells) for group in groups)
        table.add_row(str(layer), pictures, strip(neurons, source.mlp, room))
    return table
