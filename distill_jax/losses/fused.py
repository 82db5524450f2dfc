"""The output head and the loss in one, a chunk of tokens at a time.

The gradients are taken in the forward pass, while a chunk's logits are there (as in Liger Kernel,
Hsu et al. 2024), so that no logits are made twice and none are kept.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from distill_jax.losses import chunks as walk
from distill_jax.losses.objectives import Objective
from distill_jax.losses.reduction import Totals


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
      targets: the objective's targets; every array in them has N as its leading axis.
      where: [N], mask or weights. What a token of weight zero holds, be it NaN, changes neither
        value nor gradient.
      transposed: whether the unembedding is [V, D] instead, as the embedding of a tied model is.
        Transposing that one by hand would cost a copy of it and one of its gradient.
      step: the training step, for objectives with schedules.
      chunk: tokens at a time; `default_chunk` if left out.

    Returns:
      Totals over all tokens.

    Raises:
      ValueError: shapes that do not fit.
      TypeError: a forward-mode derivative was asked for (under a `jax.jit` of yours the words are
        JAX's own), or a second one.
    """
    order = "vd" if transposed else "dv"
    rows = _rows(order, hidden_ND, unembedding, targets, where)
    layout = _Layout(_chunk_size(chunk, *hidden_ND.shape), order)
    arrays = _match_varying((hidden_ND, unembedding, rows, step))
    return _first_reverse_only(_fused)(objective, layout, *arrays)


def sharded_fused_linear(
    objective: Objective,
    hidden_ND: jax.Array,
    unembedding: jax.Array,
    targets: Mapping[str, Any],
    where: jax.Array | None = None,
    *,
    transposed: bool = False,
    mesh: Mesh,
    tokens: str | Sequence[str] = ("data", "fsdp"),
    embed: str | None = "fsdp",
    vocabulary: str | None = "tensor",
    step: jax.Array | int | None = None,
    chunk: int | None = None,
) -> Totals:
    """`fused_linear` on a mesh: tokens, channels and vocabulary of the head stay split.

    Every device takes its own tokens in chunks of its own. The unembedding is gathered over `embed`
    once, in the hidden state's dtype; its gradient adds up in float32 and is reduced once, in
    float32, back to where its parameters live. The vocabulary stays split throughout (Megatron-LM,
    Shoeybi et al. 2019, section 3): a device holds [chunk, V / shards] logits, sums over the
    vocabulary become sums of [chunk] over devices, and ids are looked up where they live. The
    compiler derives that from what an objective does; one that needs the vocabulary whole, to sort
    it for instance, works too and pays for the gathering. No objective of this package does.

    Args:
      objective: as in `fused_linear`.
      hidden_ND: [N, D], N divisible by the devices of `tokens`.
      unembedding: [D, V], D divisible by the devices of `embed`. Its dtype may be wider than the
        hidden state's; its gradient then is so too.
      targets: as in `fused_linear`.
      where: as in `fused_linear`.
      transposed: as in `fused_linear`.
      mesh: the mesh, of `Auto` axes; those that are not named below must not split the arrays.
      tokens: mesh axes over which tokens are split.
      embed: the mesh axis, among `tokens`, over which the unembedding's D is split; None: whole.
      vocabulary: the mesh axis over which its V is split; None: whole.
      step: as in `fused_linear`.
      chunk: a device's tokens at a time; `default_chunk` of a device's tokens if left out.

    Returns:
      Totals over all tokens, the same on every device.

    Raises:
      ValueError: shapes that do not fit, or axes that the mesh does not have.
      TypeError: a forward-mode or a second derivative was asked for.
    """
    tokens = (tokens,) if isinstance(tokens, str) else tuple(tokens)
    _check_axes(mesh, tokens, embed, vocabulary)
    order = "vd" if transposed else "dv"
    rows = _rows(order, hidden_ND, unembedding, targets, where)
    shards = math.prod(mesh.shape[axis] for axis in tokens)
    _check_divides("tokens", hidden_ND.shape[0], shards)
    _check_divides("embed", hidden_ND.shape[1], mesh.shape.get(embed, 1))
    _check_divides("vocabulary", unembedding.shape[order.index("v")], mesh.shape.get(vocabulary, 1))
    size = _chunk_size(chunk, hidden_ND.shape[0] // shards, hidden_ND.shape[1])
    split = vocabulary if mesh.shape.get(vocabulary, 1) > 1 else None
    layout = _Layout(size, order, tokens, embed, split)

    def local(hidden_ND, unembedding, rows, step):
        return _fused(objective, layout, hidden_ND, unembedding, rows, step)

    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(tokens), layout.spec(d=embed), P(tokens), P()),
        out_specs=P(),
        axis_names=frozenset(tokens),
    )
    # Jitted, because axes that the compiler splits are unknown outside of it.
    return _first_reverse_only(jax.jit(sharded))(hidden_ND, unembedding, rows, step)


class _Layout(NamedTuple):
    """How the work is cut.

    Attributes:
      chunk: tokens at a time.
      order: the unembedding's axes, "dv" or "vd".
      tokens: axes of `shard_map` over which the totals are summed.
      embed: the axis over which the unembedding is gathered.
      vocabulary: the axis over which the compiler splits the vocabulary.
    """

    chunk: int
    order: str
    tokens: tuple[str, ...] = ()
    embed: str | None = None
    vocabulary: str | None = None

    def spec(self, **axes: str | None) -> P:
        """Mesh axes given for "d" and "v" in the unembedding's order."""
        return P(*(axes.get(letter) for letter in self.order))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(objective, layout, hidden_ND, unembedding, rows, step) -> Totals:
    unembedding = _gather(layout, unembedding, hidden_ND.dtype)
    hidden_ND, unembedding = _same_dtype(hidden_ND, unembedding)
    chunks = walk.Chunks((hidden_ND, rows), layout.chunk)

    def body(index):
        chunk_ND, chunk_rows = chunks.take(index)
        logits_NV = walk.matmul(f"nd,{layout.order}->nv", chunk_ND, unembedding)
        return walk.totals(objective, logits_NV, chunk_rows, step)

    return _add_up(layout, jax.lax.map(body, jnp.arange(chunks.count)))


def _fused_forward(objective, layout, hidden_ND, unembedding, rows, step):
    dtypes = (hidden_ND.dtype, unembedding.dtype)
    unembedding = _gather(layout, unembedding, dtypes[0])
    hidden_ND, unembedding = _same_dtype(hidden_ND, unembedding)
    chunks = walk.Chunks((hidden_ND, rows), layout.chunk)
    # Elsewhere the compiler may have spread the tokens.
    local = layout.vocabulary is None and bool(_varying(hidden_ND))

    def body(unembedding_bar, index):
        chunk_ND, chunk_rows = chunks.take(index)
        # 0 * NaN would reach the unembedding's gradient.
        chunk_ND = jnp.where(chunk_rows["where"][:, None] == 0, 0, chunk_ND)
        logits_NV = walk.matmul(f"nd,{layout.order}->nv", chunk_ND, unembedding)
        totals, bar_NV = walk.totals_and_gradient(
            objective, logits_NV, chunks, index, step, dtype=chunk_ND.dtype, local=local
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
    )


_fused.defvjp(_fused_forward, _fused_backward)


def _gather(layout, unembedding, dtype):
    if not layout.tokens:
        return unembedding
    low = _vary(unembedding.astype(dtype), frozenset(layout.tokens))
    if layout.embed is None:
        return low
    axis = layout.order.index("d")
    return _in_shards(
        layout, lambda low: jax.lax.all_gather(low, layout.embed, axis=axis, tiled=True)
    )(low)


def _scatter(layout, unembedding_bar):
    if not layout.tokens:
        return unembedding_bar
    axis = layout.order.index("d")
    others = tuple(name for name in layout.tokens if name != layout.embed)

    def reduce_to_owner(bar):
        if layout.embed is not None:
            bar = jax.lax.psum_scatter(bar, layout.embed, scatter_dimension=axis, tiled=True)
        return jax.lax.psum(bar, others) if others else bar

    return _in_shards(layout, reduce_to_owner)(unembedding_bar)


def _in_shards(layout, collective):
    """`collective` on a shard of the vocabulary: left alone, the compiler gathers V around it."""
    if layout.vocabulary is None:
        return collective
    spec = layout.spec(v=layout.vocabulary)
    return jax.shard_map(collective, in_specs=spec, out_specs=spec, axis_names={layout.vocabulary})


def _add_up(layout, totals: Totals) -> Totals:
    totals = walk.add_up(totals)
    return jax.lax.psum(totals, layout.tokens) if layout.tokens else totals


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


def _first_reverse_only(function):
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


def _chunk_size(chunk: int | None, tokens: int, embed: int) -> int:
    if chunk is None:
        return walk.default_chunk(tokens, embed)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    return min(chunk, max(tokens, 1))


def _check_axes(
    mesh: Mesh, tokens: tuple[str, ...], embed: str | None, vocabulary: str | None
) -> None:
    unknown = [a for a in (*tokens, embed, vocabulary) if a and a not in mesh.axis_names]
    if unknown or (embed and embed not in tokens) or vocabulary in tokens:
        raise ValueError(
            f"tokens {tokens}, embed {embed!r}, vocabulary {vocabulary!r} do not fit a mesh with "
            f"axes {mesh.axis_names}; embed must be among tokens, vocabulary must not"
        )
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            "sharded_fused_linear needs a mesh of Auto axes: "
            "jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))"
        )


def _check_divides(name: str, size: int, shards: int) -> None:
    if size % shards:
        raise ValueError(f"{name}: {size} do not divide over {shards} devices")


def _rows(order, hidden_ND, unembedding, targets, where) -> dict[str, Any]:
    """What travels with the tokens, once it is known to fit."""
    where = jnp.ones(hidden_ND.shape[:1]) if where is None else jnp.asarray(where, jnp.float32)
    rows = {"where": where, "targets": dict(targets)}
    _check_shapes(order, hidden_ND, unembedding, rows)
    return rows


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


def _check_shapes(order: str, hidden_ND: jax.Array, unembedding: jax.Array, rows: dict) -> None:
    if hidden_ND.ndim != 2 or unembedding.ndim != 2:
        raise ValueError(
            f"hidden and unembedding must be [N, D] and [{', '.join(order.upper())}], "
            f"got {hidden_ND.shape} and {unembedding.shape}"
        )
    if not hidden_ND.shape[0]:
        raise ValueError(f"hidden {hidden_ND.shape} has no tokens")
    if hidden_ND.shape[1] != unembedding.shape[order.index("d")]:
        raise ValueError(f"hidden {hidden_ND.shape} does not fit unembedding {unembedding.shape}")
    for path, leaf in jax.tree_util.tree_leaves_with_path(rows):
        if jnp.shape(leaf)[:1] != hidden_ND.shape[:1]:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"{name} {jnp.shape(leaf)} does not fit {hidden_ND.shape[0]} tokens")
