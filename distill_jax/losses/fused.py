"""The output head and the loss in one, a chunk of tokens at a time."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.losses.objectives import Objective
from distill_jax.losses.reduction import Totals, reduce

_CHUNK_TOKENS = 2048
_CHUNK_LOGITS = 2**28


def default_chunk(tokens: int, vocabulary: int) -> int:
    """How many tokens to take at a time.

    A chunk reads the unembedding twice and reads and writes its gradient: 16 D V bytes against
    6 chunk D V operations. From 2048 tokens on, that is over 700 operations a byte, more than an
    accelerator needs to be busy (about 170 to 560), so larger chunks only cost memory. A block of
    float32 logits is kept within 1 GiB for vocabularies beyond 131072. The tokens are then split
    evenly, in multiples of 128, so that little of the last chunk is padding.
    """
    most = max(1, min(_CHUNK_TOKENS, _CHUNK_LOGITS // vocabulary))
    if tokens <= most:
        return max(tokens, 1)
    even = -(-tokens // -(-tokens // most))
    return min(most, -(-even // 128) * 128)


def fused_linear(
    objective: Objective,
    hidden_ND: jax.Array,
    unembedding_DV: jax.Array,
    targets: Mapping[str, Any],
    where: jax.Array | None = None,
    *,
    step: jax.Array | int | None = None,
    chunk: int | None = None,
) -> Totals:
    """Equals `reduce(*objective(hidden_ND @ unembedding_DV, targets, step=step), where)`.

    It never holds the logits of more than one chunk. Under differentiation the gradients of
    the loss are taken in the forward pass, while a chunk's logits are there, and merely scaled in
    the backward pass (as in Liger Kernel, Hsu et al. 2024); without it none are computed. The
    unembedding's gradient adds up in float32 whatever the inputs are.

    Only `hidden_ND` and `unembedding_DV` receive gradients, and only from `Totals.loss`. The
    derivative is reverse-mode. Do not close the objective over something to differentiate.

    A chunk is every (N / chunk)-th token, so a token axis that is sharded over devices stays where
    it is and every device works on each chunk. Under `jax.jit` N counts all devices' tokens and so
    does `chunk`; inside `jax.shard_map`, which is faster, both are one device's.

    Args:
      objective: any `Objective`. It is called with chunks, so it must treat tokens independently.
      hidden_ND: [N, D].
      unembedding_DV: [D, V].
      targets: the objective's targets; every array in them has N as its leading axis.
      where: [N], mask or weights.
      step: the training step, for objectives with schedules.
      chunk: tokens at a time; `default_chunk` if left out.

    Returns:
      Totals over all tokens.

    Raises:
      ValueError: shapes that do not fit.
    """
    tokens = hidden_ND.shape[0]
    where = jnp.ones(tokens) if where is None else jnp.asarray(where, jnp.float32)
    rows = {"where": where, "targets": dict(targets)}
    _check_shapes(hidden_ND, unembedding_DV, rows)
    if chunk is None:
        chunk = default_chunk(tokens, unembedding_DV.shape[1])
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    chunk = min(chunk, max(tokens, 1))
    arrays = _match_varying((hidden_ND, unembedding_DV, rows, step))
    return _fused(objective, chunk, *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(objective, chunk, hidden_ND, unembedding_DV, rows, step) -> Totals:
    hidden_ND, unembedding_DV = _same_dtype(hidden_ND, unembedding_DV)
    take, chunks = _chunks((hidden_ND, rows), chunk)

    def chunk_totals(index):
        hidden, chunk_rows = take(index)
        logits = _matmul("nd,dv->nv", hidden, unembedding_DV)
        return _reduce_chunk(objective, logits, chunk_rows, step)

    return _sum(jax.lax.map(chunk_totals, jnp.arange(chunks)))


def _fused_forward(objective, chunk, hidden_ND, unembedding_DV, rows, step):
    dtypes = (hidden_ND.dtype, unembedding_DV.dtype)
    hidden_ND, unembedding_DV = _same_dtype(hidden_ND, unembedding_DV)
    take, chunks = _chunks((hidden_ND, rows), chunk)

    def body(unembedding_bar, index):
        hidden, chunk_rows = take(index)
        logits = _matmul("nd,dv->nv", hidden, unembedding_DV)

        def chunk_loss(logits):
            totals = _reduce_chunk(objective, logits, chunk_rows, step)
            return totals.loss, totals

        logits_bar, totals = jax.grad(chunk_loss, has_aux=True)(logits)
        logits_bar = logits_bar.astype(hidden.dtype)
        hidden_bar = _matmul("nv,dv->nd", logits_bar, unembedding_DV).astype(dtypes[0])
        unembedding_bar = unembedding_bar + _matmul("nd,nv->dv", hidden, logits_bar)
        return unembedding_bar, (totals, hidden_bar)

    start = _vary(jnp.zeros(unembedding_DV.shape, jnp.float32), _varying(unembedding_DV))
    unembedding_bar, (totals, hidden_bar) = jax.lax.scan(body, start, jnp.arange(chunks))
    hidden_bar = jnp.swapaxes(hidden_bar, 0, 1).reshape(-1, hidden_ND.shape[1])
    residuals = hidden_bar[: hidden_ND.shape[0]], unembedding_bar, jnp.zeros((), dtypes[1])
    return _sum(totals), residuals


def _fused_backward(objective, chunk, residuals, totals_bar):
    del objective, chunk
    hidden_bar, unembedding_bar, like = residuals
    return (
        (hidden_bar * totals_bar.loss).astype(hidden_bar.dtype),
        (unembedding_bar * totals_bar.loss).astype(like.dtype),
        None,
        None,
    )


_fused.defvjp(_fused_forward, _fused_backward)


def _reduce_chunk(objective, logits, chunk_rows, step) -> Totals:
    loss_N, terms = objective(logits, chunk_rows["targets"], step=step)
    return reduce(loss_N, terms, chunk_rows["where"])


def _sum(totals: Totals) -> Totals:
    return jax.tree.map(functools.partial(jnp.sum, axis=0), totals)


def _matmul(subscripts: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, left, right, preferred_element_type=jnp.float32)


def _same_dtype(*arrays: jax.Array) -> list[jax.Array]:
    dtype = jnp.result_type(*arrays)
    return [array.astype(dtype) for array in arrays]


def _chunks(tree, chunk: int):
    """A function that takes the i-th chunk of every leaf, and how many chunks there are.

    The last chunk is filled up with copies of the last token at weight zero: unlike zeros, they
    hold nothing that the objective does not meet anyway.
    """
    tokens = tree[0].shape[0]
    chunks = -(-tokens // chunk)
    missing = chunks * chunk - tokens
    hidden, rows = tree
    rows = {**rows, "where": jnp.pad(rows["where"], (0, missing))}

    def split(leaf: jax.Array) -> jax.Array:
        extra = chunks * chunk - leaf.shape[0]
        if extra:
            leaf = jnp.pad(leaf, [(0, extra)] + [(0, 0)] * (leaf.ndim - 1), mode="edge")
        return leaf.reshape(chunk, chunks, *leaf.shape[1:])

    blocks = jax.tree.map(split, (hidden, rows))

    def take(index):
        return jax.tree.map(
            lambda block: jax.lax.dynamic_index_in_dim(block, index, axis=1, keepdims=False), blocks
        )

    return take, chunks


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


def _check_shapes(hidden_ND: jax.Array, unembedding_DV: jax.Array, rows: dict) -> None:
    if hidden_ND.ndim != 2 or unembedding_DV.ndim != 2:
        raise ValueError(
            "hidden and unembedding must be [N, D] and [D, V], "
            f"got {hidden_ND.shape} and {unembedding_DV.shape}"
        )
    if hidden_ND.shape[1] != unembedding_DV.shape[0]:
        raise ValueError(
            f"hidden {hidden_ND.shape} does not fit unembedding {unembedding_DV.shape}"
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(rows):
        if leaf.shape[:1] != hidden_ND.shape[:1]:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"{name} {leaf.shape} does not fit {hidden_ND.shape[0]} tokens")
