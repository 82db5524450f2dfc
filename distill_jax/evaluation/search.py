"""What a search for a shape found, as a table for the terminal."""

from collections.abc import Sequence

import rich.table

from distill_jax import pruning

_SHOWN = 12


def search_table(candidates: Sequence[pruning.Candidate]) -> rich.table.Table:
    """The Pareto front, marked with a star, and the best of all others, best first."""
    front = pruning.pareto(candidates)
    others = [c for c in candidates if c not in front][: max(_SHOWN - len(front), 0)]
    table = rich.table.Table(
        title=f"{len(candidates)} shapes, by loss on calibration rows before any training",
        caption="* no other shape is both smaller and better",
    )
    columns = ("", "parameters", "layers", "hidden", "heads", "neurons", "loss", "repaired")
    for name in columns:
        table.add_column(name, justify="right")
    for candidate in sorted([*front, *others], key=lambda c: c.loss):
        shape, repaired = candidate.shape, candidate.repaired_loss
        table.add_row(
            "*" if candidate in front else "",
            f"{shape.parameters:,}",
            str(shape.layers),
            str(shape.embed),
            f"{shape.heads}/{shape.kv_heads}",
            str(shape.mlp),
            f"{candidate.loss:.3f}",
            "" if repaired is None else f"{repaired:.3f}",
        )
    return table
