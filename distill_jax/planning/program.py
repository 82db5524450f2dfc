"""One program of a stage, and what every stage's programs are described with."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from distill_jax import parallel
from distill_jax.artifacts import InputError
from distill_jax.models.llama import Remat

Stage = Literal["distill", "targets", "prune", "sft", "on-policy", "dpo"]
"""The stages whose work grows with the model, the text and the slice."""

PARTS = ("embedding", "attention", "mlp", "head", "optimizer")
"""Named scopes of the programs, for which time is told apart."""

ONE_DOCUMENT = "a row counts as one document: attention inside of shorter ones does less"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What may be decided otherwise than the recipe does, without changing what is learnt.

    Attributes:
      batch: rows at a time on each of the devices over which rows are split, or each group of
        them that shares rows; None: the recipe's.
      remat: what the backward pass recomputes; None: the recipe's.
      mesh: the arrangement of the devices; None: the recipe's.
    """

    batch: int | None = None
    remat: Remat | None = None
    mesh: parallel.MeshConfig | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One jitted function of a stage and what it is called with.

    Attributes:
      name: the stage, and which of its programs.
      lower: traces it.
      held: what devices hold while it runs by what it is, such as "parameters", "optimizer" and
        "batch": its arguments, and what waits beside them.
      mesh: its devices.
      rows: of a batch, over all devices.
      batch: rows on each of the devices over which they are split, at a time.
      remat: what the backward pass recomputes; "none" where there is none.
      tokens: of one execution.
      flops: of one execution by formula, without what is computed twice.
      total_tokens: of all executions of the stage; None if the recipe does not say.
      turns: how often a loop turns whose end only shows when it runs; None: there is none.
      notes: what was assumed.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    held: Mapping[str, Any]
    mesh: Mesh
    rows: int
    batch: int
    remat: Remat = "none"
    tokens: int
    flops: float
    total_tokens: float | None = None
    turns: int | None = None
    notes: tuple[str, ...] = ()


def rows_at_a_time(
    own: int, choice: Choice, mesh: Mesh, field: str, *, split_time: bool = False
) -> int:
    """Rows at a time of all devices; `split_time` as in `parallel.row_axes`."""
    shards = parallel.row_shards(mesh, split_time=split_time)
    if choice.batch is not None:
        return choice.batch * shards
    if own % shards:
        raise InputError(
            f"{field}: {own} rows at a time do not divide over {shards} devices; change it or the "
            f"mesh, or try --batch 1, which is {shards} rows"
        )
    return own


def described(leaf: Any, rows: int, sharding: Any) -> jax.ShapeDtypeStruct:
    """An array of `rows` such leaves."""
    array = np.asarray(leaf)
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    return jax.ShapeDtypeStruct((rows, *array.shape), dtype, sharding=sharding)
