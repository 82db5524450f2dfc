"""Walking over the tokens of the fused head: chunks, and on CPU what fits the cache.

A chunk's logits are made by one matrix product. The objective and its gradient then walk over
them, and two more products give the chunk's share of both gradients. Those three products are what
any objective must pay for. On CPU, to pay little more, the objective sees a few rows at a time, as
many as stay in the cache, and the unembedding's gradient adds up a tile of the vocabulary at a
time. On accelerators that would only make kernels small, so they take a chunk at once.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.losses import lookups
from distill_jax.losses.objectives import Objective
from distill_jax.losses.reduction import Totals, reduce

_CACHED_ELEMENTS = 2**19  # of float32 logits: 2 MiB, a core's share of the cache
_TILE_ELEMENTS = 2**22  # of the unembedding's gradient: 16 MiB
LEAST_CHUNK, _MOST_CHUNK = 256, 2048


def default_chunk(tokens: int, embed: int, live: int = 0, least: int = LEAST_CHUNK) -> int:
    """How many tokens to take at a time: half as many as the hidden state has channels.

    A chunk's logits and their gradient, 2 chunk V values, are then no larger than the gradient of
    the unembedding, D V values, which has to be held anyway: whatever the vocabulary, the head
    needs at most twice that. The logits of `live` teachers count as well, which makes chunks
    smaller: D / (2 + live) tokens; their unembeddings come on top. More than 2048 only cost memory.

    From `least` tokens on, at least 256, adding up that gradient costs no more than the products
    that make it: where D asks for fewer, these are taken, 2 `least` V values; with live teachers a
    share of them, for the sake of memory. The tokens are then split evenly, in multiples of 16 (the
    rows of a tile on a TPU), so that little of the last chunk is padding.

    Args:
      tokens: how many there are.
      embed: D.
      live: teachers whose logits are made with the student's.
      least: see above; 256 are enough for a CPU, `parallel.least_chunk` says it of a TPU.
    """
    least = -(-max(least // (1 + live), LEAST_CHUNK) // 16) * 16
    most = max(min(embed // (2 + live), _MOST_CHUNK), least)
    if tokens <= most:
        return max(tokens, 1)
    even = -(-tokens // -(-tokens // most))
    return min(most, -(-even // 16) * 16)


class Chunks:
    """Arrays of tokens [N, ...] in `count` chunks: chunk i is the tokens i, i + count, ...

    The last chunk is filled up with copies of the last token at weight zero: unlike zeros, they
    hold nothing that the objective does not meet anyway.
    """

    def __init__(self, tree, chunk: int):
        hidden, rows = tree
        self.size = chunk
        self.count = -(-hidden.shape[0] // chunk)
        missing = self.count * chunk - hidden.shape[0]
        rows = {**rows, "where": jnp.pad(rows["where"], (0, missing))}
        self._blocks = jax.tree.map(self._split, (hidden, rows))

    def _split(self, leaf: jax.Array) -> jax.Array:
        extra = self.count * self.size - leaf.shape[0]
        if extra:
            leaf = jnp.pad(leaf, [(0, extra)] + [(0, 0)] * (leaf.ndim - 1), mode="edge")
        return leaf.reshape(self.size, self.count, *leaf.shape[1:])

    def take(self, index, start=0, size: int | None = None):
        """Hidden states and rows of `size` tokens of chunk `index`, from its token `start` on."""
        size = self.size if size is None else size

        def slice_(block: jax.Array) -> jax.Array:
            starts = (start, index) + (0,) * (block.ndim - 2)
            taken = jax.lax.dynamic_slice(block, starts, (size, 1, *block.shape[2:]))
            return taken.reshape(size, *block.shape[2:])

        return jax.tree.map(slice_, self._blocks)


def totals(
    objective: Objective,
    logits_NV: jax.Array,
    teachers: Mapping[str, jax.Array],
    rows: Any,
    step: Any,
) -> Totals:
    """The reduced objective of some tokens; `teachers` are logits that stand for targets."""
    targets = {**rows["targets"], **teachers}
    return reduce(*objective(logits_NV, targets, step=step), rows["where"])


def totals_and_gradient(
    objective: Objective,
    logits_NV: jax.Array,
    teachers: Mapping[str, jax.Array],
    chunks: Chunks,
    index: jax.Array,
    step: Any,
    *,
    dtype: Any,
    local: bool,
) -> tuple[Totals, jax.Array]:
    """The reduced objective of chunk `index`, and the gradient of its loss by its logits.

    Args:
      objective: the objective.
      logits_NV: the chunk's logits.
      teachers: the logits [N, V] of those that are made with them, by name.
      chunks: all chunks.
      index: which of them.
      step: the training step.
      dtype: of the gradient.
      local: whether the chunk is known to lie on one device.
    """

    def of_rows(made, rows):
        logits_NV, teachers = made

        def loss(logits_NV):
            result = totals(objective, logits_NV, teachers, rows, step)
            return result.loss, result

        return lookups.result_and_gradient(loss, logits_NV, rows["where"], dtype, local=local)

    def at_once(made, index):
        return of_rows(made, chunks.take(index)[1])

    def by_blocks(made, index):
        def block(start):
            part = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), made)
            return of_rows(part, chunks.take(index, start, size)[1])

        result, gradient = jax.lax.map(block, jnp.arange(0, chunks.size, size))
        return add_up(result), gradient.reshape(logits_NV.shape)

    size = _divisor(chunks.size, max(1, _CACHED_ELEMENTS // logits_NV.shape[1]))
    made = logits_NV, teachers
    if size == chunks.size:
        return at_once(made, index)
    return jax.lax.platform_dependent(made, index, cpu=by_blocks, default=at_once)


def add_product(
    total: jax.Array, hidden_ND: jax.Array, logits_bar_NV: jax.Array, *, order: str, tiled: bool
) -> jax.Array:
    """total + hidden^T logits_bar.

    Args:
      total: [D, V] or [V, D], as `order`, "dv" or "vd", says.
      hidden_ND: [N, D].
      logits_bar_NV: [N, V].
      order: the axes of `total`.
      tiled: whether the vocabulary may be cut into tiles.
    """
    axis, vocabulary = order.index("v"), logits_bar_NV.shape[1]
    tile = max(128, _TILE_ELEMENTS // hidden_ND.shape[1] // 128 * 128)
    tiles, rest = divmod(vocabulary, tile)

    def at_once(total, hidden_ND, logits_bar_NV):
        return total + matmul(f"nd,nv->{order}", hidden_ND, logits_bar_NV)

    def by_tiles(total, hidden_ND, logits_bar_NV):
        def add(start, size, total):
            part_NV = jax.lax.dynamic_slice_in_dim(logits_bar_NV, start, size, 1)
            before = jax.lax.dynamic_slice_in_dim(total, start, size, axis)
            after = at_once(before, hidden_ND, part_NV)
            return jax.lax.dynamic_update_slice_in_dim(total, after, start, axis)

        total = jax.lax.fori_loop(0, tiles, lambda i, total: add(i * tile, tile, total), total)
        return add(tiles * tile, rest, total) if rest else total

    arrays = total, hidden_ND, logits_bar_NV
    if not (tiled and tiles):
        return at_once(*arrays)
    return jax.lax.platform_dependent(*arrays, cpu=by_tiles, default=at_once)


def add_up(parts: Totals) -> Totals:
    """The sum of totals that lie along a leading axis."""
    return jax.tree.map(functools.partial(jnp.sum, axis=0), parts)


def matmul(subscripts: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """A product that adds up in float32."""
    return jnp.einsum(subscripts, left, right, preferred_element_type=jnp.float32)


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`."""
    return next(size for size in range(min(number, most), 0, -1) if number % size == 0)
