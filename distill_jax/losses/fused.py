"""The output head and the loss in one, a chunk of tokens at a time.

The gradients are taken in the forward pass, while a chunk's logits are there (as in Liger Kernel,
Hsu et al. 2024), so that no logits are made twice and none are kept.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from distill_jax.losses import chunks as walk
from distill_jax.losses.objectives import Objective
from distill_jax.losses.reduction import Totals
from distill_jax.losses.targets import LiveTargets


def fused_linear(
    objective: Objective,
    hidden_ND: jax.Array,
    unembedding: jax.Array,
    targets: Mapping[str, Any],
    where: jax.Array | None = None,
    *,
    transposed: bool = False,
    step: jax.Array | int | None = None,
    chunk: int | None = None,
    least_chunk: int = walk.LEAST_CHUNK,
) -> Totals:
    """Equals `reduce(*objective(hidden_ND @ unembedding, targets, step=step), where)`.

    It never holds the logits of more than one chunk. Under differentiation the gradients of
    the loss are taken in the forward pass, while a chunk's logits are there, and merely scaled in
    the backward pass (as in Liger Kernel, Hsu et al. 2024); without it none are computed. The
    unembedding's gradient adds up in float32 whatever the inputs are.

    An objective that reads logits only through this package, against labels and stored targets,
    costs little more than cross-entropy with several teachers, too: all U ids that it looks up for
    a token come from one array of logits, and its gradient is one pass over them. One that needs
    more of the logits (for a teacher's logits, label smoothing, something of its own), looks ids up
    within `jax.jit`, `jax.lax.scan` and the like, or has U^2 > V is differentiated as usual.

    Only `hidden_ND` and `unembedding` receive gradients, and only from `Totals.loss`. The
    derivative is the first, in reverse mode. Do not close the objective over a traced array: pass
    it in `targets`, or as `step`, which a schedule reads.

    A chunk is every (N / chunk)-th token, so a token axis that is sharded over devices stays where
    it is and every device works on each chunk. Under `jax.jit` N counts all devices' tokens and so
    does `chunk`; inside `jax.shard_map`, which is faster, both are one device's.
    `sharded_fused_linear` does that for parameters sharded over a mesh, the vocabulary included.

    Args:
      objective: any `Objective`. It is called with some of the tokens at a time, so it must treat
        tokens independently, and called several times, so it must be pure.
      hidden_ND: [N, D].
      unembedding: [D, V]. Products are taken in the wider dtype of both.
      targets: the objective's targets; every array in them has N as its leading axis. For
        `LiveTargets`, an unembedding apart, the objective gets an array of logits.
      where: [N], mask or weights. What a token of weight zero holds, be it NaN, changes neither
        value nor gradient.
      transposed: whether the unembedding is [V, D] instead, as the embedding of a tied model is.
        Transposing that one by hand would cost a copy of it and one of its gradient.
      step: the training step, for objectives with schedules.
      chunk: tokens at a time; `default_chunk` if left out.
      least_chunk: what that one should not go below.

    Returns:
      Totals over all tokens.

    Raises:
      ValueError: shapes that do not fit.
      TypeError: a forward-mode derivative was asked for (under a `jax.jit` of yours the words are
        JAX's own), or a second one.
    """
    layout = Layout(chunk, order_of(transposed), least=least_chunk)
    rows, heads = rows_of(layout, hidden_ND, unembedding, targets, where)
    arrays = _match_varying((hidden_ND, unembedding, rows, heads, step))
    return first_reverse_only(fused)(objective, layout, *arrays)


class Layout(NamedTuple):
    """How the work is cut.

    Attributes:
      chunk: tokens at a time; None: `default_chunk`.
      order: the unembedding's axes, "dv" or "vd".
      tokens: axes of `shard_map` over which the totals are summed.
      embed: those over which the unembedding is gathered, the outermost first.
      vocabulary: the axis over which the compiler splits the vocabulary.
      within: whether the `shard_map` is the caller's, who adds up the totals; it checks nothing.
      least: what `default_chunk` should not go below.
    """

    chunk: int | None
    order: str
    tokens: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()
    vocabulary: str | None = None
    within: bool = False
    least: int = walk.LEAST_CHUNK

    def spec(self, **axes: str | tuple[str, ...] | None) -> P:
        """Mesh axes given for "d" and "v" in the unembedding's order."""
        return P(*(axes.get(letter) for letter in self.order))

    def of(self, live: LiveTargets) -> "Layout":
        """How the head of a teacher lies that runs beside the student."""
        embed = self.embed if live.embed is None else live.embed
        return self._replace(order=order_of(live.transposed), embed=embed)

    def chunks(self, hidden_ND: jax.Array, rows: dict[str, Any], live: int) -> walk.Chunks:
        """One device's tokens, cut up; `live` teachers read them."""
        tokens, embed = hidden_ND.shape
        chunk = self.chunk or walk.default_chunk(tokens, embed, live, self.least)
        return walk.Chunks((hidden_ND, rows), min(chunk, max(tokens, 1)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def fused(objective, layout, hidden_ND, unembedding, rows, heads, step) -> Totals:
    """The totals of `rows_of` some tokens, with derivatives; what `fused_linear` does, laid out."""
    unembedding = _gather(layout, unembedding, hidden_ND.dtype)
    hidden_ND, unembedding = _same_dtype(hidden_ND, unembedding)
    heads = _whole_heads(layout, rows, heads)
    chunks = layout.chunks(hidden_ND, rows, len(heads))

    def body(index):
        chunk_ND, chunk_rows = chunks.take(index)
        logits_NV = walk.matmul(f"nd,{layout.order}->nv", chunk_ND, unembedding)
        teachers = _teachers_logits(layout, chunk_rows, heads)
        return walk.totals(objective, logits_NV, teachers, chunk_rows, step)

    return _add_up(layout, jax.lax.map(body, jnp.arange(chunks.count)))


def _fused_forward(objective, layout, hidden_ND, unembedding, rows, heads, step):
    dtypes = (hidden_ND.dtype, unembedding.dtype)
    unembedding = _gather(layout, unembedding, dtypes[0])
    hidden_ND, unembedding = _same_dtype(hidden_ND, unembedding)
    heads = _whole_heads(layout, rows, heads)
    chunks = layout.chunks(hidden_ND, rows, len(heads))
    # Elsewhere the compiler may have spread the tokens.
    local = layout.vocabulary is None and bool(layout.tokens or _varying(hidden_ND))

    def body(unembedding_bar, index):
        chunk_ND, chunk_rows = chunks.take(index)
        # 0 * NaN would reach the unembedding's gradient.
        chunk_ND = jnp.where(chunk_rows["where"][:, None] == 0, 0, chunk_ND)
        logits_NV = walk.matmul(f"nd,{layout.order}->nv", chunk_ND, unembedding)
        teachers = _teachers_logits(layout, chunk_rows, heads)
        totals, bar_NV = walk.totals_and_gradient(
            objective, logits_NV, teachers, chunks, index, step, dtype=chunk_ND.dtype, local=local
        )
        unembedding_bar = walk.add_product(
            unembedding_bar, chunk_ND, bar_NV, order=layout.order, tiled=layout.vocabulary is None
        )
        chunk_bar_ND = walk.matmul(f"nv,{layout.order}->nd", bar_NV, unembedding).astype(dtypes[0])
        return unembedding_bar, (totals, chunk_bar_ND)

    varying = _varying(hidden_ND) | _varying(unembedding)
    zeros = _vary(jnp.zeros(unembedding.shape, jnp.float32), varying)
    unembedding_bar, (totals, bar) = jax.lax.scan(body, zeros, jnp.arange(chunks.count))
    hidden_bar_ND = jnp.swapaxes(bar, 0, 1).reshape(-1, hidden_ND.shape[1])
    bars = hidden_bar_ND[: hidden_ND.shape[0]], _scatter(layout, unembedding_bar)
    return _add_up(layout, totals), (_first_order_only(bars), jnp.zeros((), dtypes[1]))


def _fused_backward(objective, layout, residuals, totals_bar):
    del objective, layout
    (hidden_bar, unembedding_bar), like = residuals
    return (
        (hidden_bar * totals_bar.loss).astype(hidden_bar.dtype),
        (unembedding_bar * totals_bar.loss).astype(like.dtype),
        None,
        None,
        None,
    )


fused.defvjp(_fused_forward, _fused_backward)


def _whole_heads(layout, rows, heads):
    """The unembeddings of live teachers, gathered."""
    live = rows["targets"]
    return {
        name: _gather(layout.of(live[name]), head, live[name].hidden.dtype)
        for name, head in heads.items()
    }


def _teachers_logits(layout, rows, heads):
    """The logits of live teachers for some tokens."""

    def logits(live, head):
        subscripts = f"nd,{layout.of(live).order}->nv"
        return walk.matmul(subscripts, *_same_dtype(live.hidden, head))

    return {name: logits(rows["targets"][name], head) for name, head in heads.items()}


def _gather(layout, unembedding, dtype):
    if not layout.tokens:
        return unembedding
    axis = layout.order.index("d")

    def gather(low):
        for name in reversed(layout.embed):
            low = jax.lax.all_gather(low, name, axis=axis, tiled=True)
        return low

    return _in_shards(layout, gather)(_vary(unembedding.astype(dtype), frozenset(layout.tokens)))


def _scatter(layout, unembedding_bar):
    if not layout.tokens:
        return unembedding_bar
    axis = layout.order.index("d")
    others = tuple(name for name in layout.tokens if name not in layout.embed)
    if layout.within:
        others = tuple(name for name in others if jax.lax.axis_size(name) > 1)

    def reduce_to_owner(bar):
        # One after the other: over several axes at once a TPU sums everything everywhere.
        for name in layout.embed:
            bar = jax.lax.psum_scatter(bar, name, scatter_dimension=axis, tiled=True)
        return jax.lax.psum(bar, others) if others else bar

    return _in_shards(layout, reduce_to_owner)(unembedding_bar)


def _in_shards(layout, collective):
    """`collective` on a shard of the vocabulary: left alone, the compiler gathers V around it."""
    if layout.vocabulary is None:
        return collective
    spec = layout.spec(v=layout.vocabulary)
    return jax.shard_map(
        collective,
        in_specs=spec,
        out_specs=spec,
        axis_names={layout.vocabulary},
        check_vma=not layout.within,
    )


def _add_up(layout, totals: Totals) -> Totals:
    totals = walk.add_up(totals)
    return jax.lax.psum(totals, layout.tokens) if layout.tokens and not layout.within else totals


def _same_dtype(*arrays: jax.Array) -> list[jax.Array]:
    dtype = jnp.result_type(*arrays)
    return [array.astype(dtype) for array in arrays]


@jax.custom_jvp
def _first_order_only(bars):
    """Marks gradients that cannot be differentiated again."""
    return bars


@_first_order_only.defjvp
def _refuse(primals, tangents):
    del primals, tangents
    raise TypeError(
        "fused_linear has no second derivative: its gradient is taken in the forward pass; call "
        "the objective on hidden_ND @ unembedding instead"
    )


def first_reverse_only(function):
    """Says what to do where JAX only says that it cannot."""

    @functools.wraps(function)
    def call(*args):
        try:
            return function(*args)
        except TypeError as error:
            if "forward-mode" not in str(error):
                raise
            message = (
                "fused_linear has no forward-mode derivative (jvp, jacfwd): use "
                "jax.grad or jax.vjp, or call the objective on hidden_ND @ unembedding"
            )
            raise TypeError(message) from error

    return call


def order_of(transposed: bool) -> str:
    """The axes of an unembedding."""
    return "vd" if transposed else "dv"


def rows_of(
    layout: Layout, hidden_ND, unembedding, targets, where
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """What travels with the tokens, and the unembeddings of live teachers, once all is checked."""
    if layout.chunk is not None and layout.chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {layout.chunk}")
    live = {name: one for name, one in targets.items() if isinstance(one, LiveTargets)}
    _check_head(layout, hidden_ND, unembedding)
    size = unembedding.shape[layout.order.index("v")]
    for name, one in live.items():
        own = layout.of(one)
        _check_head(own, one.hidden, one.unembedding, f"{name}: ")
        if (vocabulary := one.unembedding.shape[own.order.index("v")]) != size:
            raise ValueError(f"{name}: has {vocabulary} ids, the student {size}")
    heads = {name: one.unembedding for name, one in live.items()}
    beside: dict[str, Any] = {name: _without_head(one) for name, one in live.items()}
    where = jnp.ones(hidden_ND.shape[:1]) if where is None else jnp.asarray(where, jnp.float32)
    rows = {"where": where, "targets": {**targets, **beside}}
    for path, leaf in jax.tree_util.tree_leaves_with_path(rows):
        if jnp.shape(leaf)[:1] != hidden_ND.shape[:1]:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"{name} {jnp.shape(leaf)} does not fit {hidden_ND.shape[0]} tokens")
    return rows, heads


def _match_varying(tree):
    """Makes all arrays vary over the axes of `shard_map` over which any of them does.

    The transpose of this sums the unembedding's gradient over the devices.
    """
    leaves = jax.tree.leaves(tree)
    axes = frozenset().union(*(_varying(leaf) for leaf in leaves))
    return jax.tree.map(lambda leaf: _vary(leaf, axes), tree)


def _varying(array: jax.Array) -> frozenset:
    """The mesh axes over which an array's value differs inside `shard_map`."""
    return jax.typeof(array).manual_axis_type.varying


def _vary(array: jax.Array, axes: frozenset) -> jax.Array:
    missing = tuple(sorted(axes - _varying(array)))
    return jax.lax.pcast(array, missing, to="varying") if missing else array


def _without_head(live: Any) -> LiveTargets:
    """All of whose arrays belong to tokens."""
    return dataclasses.replace(live, unembedding=None)


def _check_head(
    layout: Layout, hidden_ND: jax.Array, unembedding: jax.Array, whose: str = ""
) -> None:
    if hidden_ND.ndim != 2 or unembedding.ndim != 2:
        raise ValueError(
            f"{whose}hidden and unembedding must be [N, D] and "
            f"[{', '.join(layout.order.upper())}], got {hidden_ND.shape} and {unembedding.shape}"
        )
    if not hidden_ND.shape[0]:
        raise ValueError(f"{whose}hidden {hidden_ND.shape} has no tokens")
    parts = math.prod(map(jax.lax.axis_size, layout.embed)) if layout.within else 1
    if hidden_ND.shape[1] != parts * unembedding.shape[layout.order.index("d")]:
        raise ValueError(
            f"{whose}hidden {hidden_ND.shape} does not fit unembedding {unembedding.shape}"
        )
