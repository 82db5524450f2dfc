"""The fused head on a mesh."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from distill_jax.losses.chunks import LEAST_CHUNK
from distill_jax.losses.fused import Layout, first_reverse_only, fused, order_of, rows_of
from distill_jax.losses.objectives import Objective
from distill_jax.losses.reduction import Totals


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
    embed: str | Sequence[str] | None = "fsdp",
    vocabulary: str | None = "tensor",
    step: jax.Array | int | None = None,
    chunk: int | None = None,
    least_chunk: int = LEAST_CHUNK,
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
      targets: as in `fused_linear`; unembeddings of `LiveTargets` lie split as this one.
      where: as in `fused_linear`.
      transposed: as in `fused_linear`.
      mesh: the mesh, of `Auto` axes; those that are not named below must not split the arrays.
      tokens: mesh axes over which tokens are split.
      embed: mesh axes, among `tokens`, over which the unembedding's D is split, outermost first;
        None: it is whole.
      vocabulary: the mesh axis over which its V is split; None: whole.
      step: as in `fused_linear`.
      chunk: a device's tokens at a time; `default_chunk` of a device's tokens if left out.
      least_chunk: as in `fused_linear`.

    Returns:
      Totals over all tokens, the same on every device.

    Raises:
      ValueError: shapes that do not fit, or axes that the mesh does not have.
      TypeError: a forward-mode or a second derivative was asked for.
    """
    tokens, embed = (
        (axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in (tokens, embed)
    )
    _check_axes(mesh, tokens, embed, vocabulary)
    split = vocabulary if mesh.shape.get(vocabulary, 1) > 1 else None
    layout = Layout(chunk, order_of(transposed), tokens, embed, split, least=least_chunk)
    rows, heads = rows_of(layout, hidden_ND, unembedding, targets, where)
    size = unembedding.shape[layout.order.index("v")]
    _check_divides("tokens", hidden_ND.shape[0], _devices(mesh, tokens))
    _check_divides("embed", hidden_ND.shape[1], _devices(mesh, embed))
    _check_divides("vocabulary", size, mesh.shape.get(vocabulary, 1))
    places = {}
    for name in heads:
        live = rows["targets"][name]
        own = layout.of(live)
        _check_axes(mesh, tokens, own.embed, vocabulary)
        _check_divides(f"{name}: embed", live.hidden.shape[1], _devices(mesh, own.embed))
        places[name] = own.spec(d=own.embed)

    def local(*arrays):
        return fused(objective, layout, *arrays)

    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(tokens), layout.spec(d=embed), P(tokens), places, P()),
        out_specs=P(),
        axis_names=frozenset(tokens),
    )
    # Jitted, because axes that the compiler splits are unknown outside of it.
    return first_reverse_only(jax.jit(sharded))(hidden_ND, unembedding, rows, heads, step)


def fused_linear_of_shares(
    objective: Objective,
    hidden_ND: jax.Array,
    unembedding: jax.Array,
    targets: Mapping[str, Any],
    where: jax.Array | None = None,
    *,
    transposed: bool = False,
    tokens: Sequence[str],
    embed: Sequence[str] = (),
    vocabulary: str | None = None,
    step: jax.Array | int | None = None,
    chunk: int | None = None,
    least_chunk: int = LEAST_CHUNK,
) -> Totals:
    """What each device does of `sharded_fused_linear`, inside of a `shard_map` over `tokens`.

    That `shard_map` has `check_vma=False`, and takes gradients inside: of its own hidden states a
    device gets its own, of its share of the unembedding those of all devices' tokens.

    Args:
      objective: as in `fused_linear`.
      hidden_ND: [N, D] of this device's tokens.
      unembedding: this device's share of [D, V]: its part of D.
      targets: as in `fused_linear`, of this device's tokens; of `LiveTargets` this device's share.
      where: the same.
      transposed: as in `fused_linear`.
      tokens: mesh axes over which tokens are split.
      embed: mesh axes, among `tokens`, over which D is split, the outermost first.
      vocabulary: the mesh axis, left to the compiler, over which V is split; None: whole.
      step: as in `fused_linear`.
      chunk: this device's tokens at a time.
      least_chunk: as in `fused_linear`.

    Returns:
      Totals over this device's tokens.
    """
    order = order_of(transposed)
    layout = Layout(
        chunk, order, tuple(tokens), tuple(embed), vocabulary, within=True, least=least_chunk
    )
    rows, heads = rows_of(layout, hidden_ND, unembedding, targets, where)
    return fused(objective, layout, hidden_ND, unembedding, rows, heads, step)


def _check_axes(
    mesh: Mesh, tokens: tuple[str, ...], embed: tuple[str, ...], vocabulary: str | None
) -> None:
    unknown = [a for a in (*tokens, *embed, vocabulary) if a and a not in mesh.axis_names]
    if unknown or not set(embed) <= set(tokens) or vocabulary in tokens:
        raise ValueError(
            f"tokens {tokens}, embed {embed}, vocabulary {vocabulary!r} do not fit a mesh with "
            f"axes {mesh.axis_names}; embed must be among tokens, vocabulary must not"
        )
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            "sharded_fused_linear needs a mesh of Auto axes: "
            "jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))"
        )


def _devices(mesh: Mesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _check_divides(name: str, size: int, shards: int) -> None:
    if size % shards:
        raise ValueError(f"{name}: {size} do not divide over {shards} devices")
