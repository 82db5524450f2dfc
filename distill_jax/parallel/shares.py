"""Parameters of which every device holds a share, and computations that make them whole.

Left to itself the compiler sums many gradients over all devices in the type of the computation and
throws most of each sum away. Here every device works on its own rows, makes a layer's parameters
whole when it needs them (ZeRO stage 3, Rajbhandari et al. 2020; FSDP, Zhao et al. 2023), and a
gradient is summed once, in float32, straight into the shares: a reduce-scatter along each mesh axis
in turn, since along several axes at once a TPU sums everything everywhere.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from distill_jax.parallel.mesh import names_of, row_axes, shardings

Spec = tuple[tuple[str, ...], ...]
"""The mesh axes over which each axis of an array is split, the outermost first."""


class Shares:
    """How parameters lie on a mesh, and how they are made whole inside of `over_rows`.

    Attributes:
      mesh: the mesh.
      rows: the mesh axes over which rows, or their times, are split.
      specs: the parameters' tree of PartitionSpecs, with those axes alone.
    """

    def __init__(self, mesh: Mesh, axes: Any, shapes: Any, dtype: str | None = None):
        """See the class.

        Args:
          mesh: the mesh.
          axes: tree of tuples of logical axis names.
          shapes: the same tree with arrays or ShapeDtypeStructs.
          dtype: what whole parameters are cast to before they travel; None leaves them as they are.
        """
        self.mesh, self.rows = mesh, row_axes(mesh)
        self._dtype = dtype or str(jax.tree.leaves(shapes)[0].dtype)
        self._splits = jax.tree.map(
            lambda s: tuple(map(names_of, s.spec)), shardings(mesh, axes, shapes)
        )
        self.specs = jax.tree.map(
            lambda split: PartitionSpec(*(_among(names, self.rows) or None for names in split)),
            self._splits,
            is_leaf=_is_split,
        )

    def whole(self, name: str) -> Callable[[Any], Any]:
        """A function that makes the parameters of a name whole, in the dtype of the computation.

        Its derivative sums in float32 over all rows. The leading axes of stacked parameters may be
        gone, and must not be split.
        """

        def one(path: Any, share: Array, split: Spec) -> Array:
            split = split[len(split) - share.ndim :]
            what = ".".join([name, *(key.key for key in path)])
            return _gather(share, split, self._dtype, self.rows, what)

        return lambda tree: jax.tree.map_with_path(one, tree, self._splits[name])

    def lookup(self, name: str) -> Callable[[Array, Array], Array]:
        """A function (table_VD, tokens) -> rows [..., D] of a table that is split along D.

        Tokens travel to the shares of D and rows come back, far less than the table would be.
        """
        vocabulary, embed = self._splits[name]

        def look_up(table: Array, tokens: Array) -> Array:
            outer, inner = embed[:1], embed[1:]
            summed = tuple(name for name in self.rows if name not in outer)
            table = _gather(table, (vocabulary, inner), str(table.dtype), summed, name)
            ids = tokens.reshape(-1)
            for axis in outer:
                ids = jax.lax.all_gather(ids, axis, tiled=True)
            rows = table[ids].astype(self._dtype)
            for axis in outer:
                rows = jax.lax.all_to_all(rows, axis, split_axis=0, concat_axis=1, tiled=True)
            return rows.reshape(*tokens.shape, -1)

        return look_up

    def split_of(self, name: str) -> Spec:
        """The mesh axes, those beside rows included, over which a parameter's axes are split."""
        return self._splits[name]


def map_rows(
    function: Callable[..., Any],
    shares: Shares,
    *,
    split_time: bool = False,
    out: PartitionSpec | None = None,
) -> Callable[..., Any]:
    """`function(params, *rows)` of every device's share of the parameters and its rows.

    Args:
      function: gives arrays with as many rows as it gets.
      shares: how the parameters lie; their tree is the first argument.
      split_time: as in `over_rows`.
      out: how what the function gives is put together; None: as rows are, the same on devices that
        get the same ones.

    Returns:
      A function of global arrays; it has no derivative.
    """
    rows = PartitionSpec(row_axes(shares.mesh, split_time=split_time))

    def call(params: Any, *arrays: Any) -> Any:
        places = (shares.specs, *(rows for _ in arrays))
        return _shard_map(function, shares, places, rows if out is None else out)(params, *arrays)

    return call


def over_rows(
    function: Callable[..., Any], shares: Shares, *frozen: Any, split_time: bool = False
) -> Callable[..., Any]:
    """`function(params, rows, step, *others)` of every device's share and its rows.

    Args:
      function: what to compute of a device's rows, a tree of sums with a scalar `loss`.
      shares: how the parameters lie; their tree is the first argument.
      *frozen: trees of specs of `Shares`, for the other arguments, which have no derivative.
      split_time: whether the devices along `TIME_AXIS` get the same rows; the function then sees
        to it that each computes with other times of them.

    Returns:
      A function of global arrays that gives the sums over all rows. With respect to the parameters
      the derivative of `loss` is taken together with the value, if it is asked for.
    """
    rows = PartitionSpec(row_axes(shares.mesh, split_time=split_time))
    places = (shares.specs, rows, PartitionSpec(), *frozen)

    def with_gradient(params: Any, *others: Any) -> Any:
        def loss(params: Any) -> tuple[Array, Any]:
            totals = function(params, *others)
            return totals.loss, totals

        (_, totals), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return jax.lax.psum(totals, shares.rows), gradient

    def without(*arguments: Any) -> Any:
        return jax.lax.psum(function(*arguments), shares.rows)

    @jax.custom_vjp
    def call(*arguments: Any) -> Any:
        return _shard_map(without, shares, places, PartitionSpec())(*arguments)

    def forward(*arguments: Any) -> Any:
        out = (PartitionSpec(), shares.specs)
        return _shard_map(with_gradient, shares, places, out)(*arguments)

    def backward(gradient: Any, bar: Any) -> Any:
        scaled = jax.tree.map(lambda g: (g * bar.loss).astype(g.dtype), gradient)
        return scaled, *(None for _ in places[1:])

    call.defvjp(forward, backward)
    return call


def _shard_map(
    function: Callable[..., Any], shares: Shares, places: tuple[Any, ...], out: Any
) -> Callable[..., Any]:
    return jax.shard_map(
        function,
        mesh=shares.mesh,
        in_specs=places,
        out_specs=out,
        axis_names=frozenset(shares.rows),
        # What is summed where is said in so many words, and kernels do not say what varies.
        check_vma=False,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _gather(share: Array, split: Spec, dtype: str, rows: tuple[str, ...], what: str) -> Array:
    """The whole of a share; its derivative is summed over the axes `rows`, in float32.

    Collectives lie in scopes that say of what they are: "whole.layers.mlp.gate" and "gradient...".
    """
    return _all_gather(share, split, dtype, rows, what)


def _all_gather(share: Array, split: Spec, dtype: str, rows: tuple[str, ...], what: str) -> Array:
    def gather(share: Array) -> Array:
        for axis, names in enumerate(split):
            for name in reversed(_among(names, rows)):
                share = jax.lax.all_gather(share, name, axis=axis, tiled=True)
        return share

    with jax.named_scope(f"whole.{what}"):
        return _on_shards(split, rows, gather)(share.astype(dtype))


def _gather_forward(share: Array, *static: Any) -> Any:
    return _all_gather(share, *static), jnp.zeros((), share.dtype)


def _gather_backward(
    split: Spec, dtype: str, rows: tuple[str, ...], what: str, like: Array, bar: Array
) -> tuple[Array]:
    del dtype

    def reduce(bar: Array) -> Array:
        for axis, names in enumerate(split):
            for name in _among(names, rows):
                bar = jax.lax.psum_scatter(bar, name, scatter_dimension=axis, tiled=True)
        used = {name for names in split for name in names}
        rest = tuple(n for n in rows if n not in used and jax.lax.axis_size(n) > 1)
        return jax.lax.psum(bar, rest) if rest else bar

    with jax.named_scope(f"gradient.{what}"):
        return (_on_shards(split, rows, reduce)(bar.astype(jnp.float32)).astype(like.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


def _on_shards(
    split: Spec, rows: tuple[str, ...], collective: Callable[[Array], Array]
) -> Callable[[Array], Array]:
    """A collective on shards of other axes: left alone, the compiler gathers those around it."""
    others = tuple(tuple(name for name in names if name not in rows) or None for names in split)
    axes = frozenset(name for names in others if names for name in names)
    if not axes:
        return collective
    spec = PartitionSpec(*others)
    return jax.shard_map(
        collective, in_specs=spec, out_specs=spec, axis_names=axes, check_vma=False
    )


def _among(names: tuple[str, ...], chosen: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name in chosen)


def _is_split(value: Any) -> bool:
    return isinstance(value, tuple)
