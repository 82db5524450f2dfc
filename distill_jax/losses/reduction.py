"""The one masked reduction: sums that may be added, divided once at the end."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("loss", "weight", "terms"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over tokens. Add them over microbatches, `psum` them over devices, then take the mean.

    Because only sums travel, neither gradient accumulation nor devices nor padding change the
    mean: a token counts the same wherever it lies.

    Attributes:
      loss: scalar, weighted sum of the loss.
      weight: scalar, sum of the weights (the number of tokens, for a mask).
      terms: weighted sum of each named term; carries no gradient.
    """

    loss: jax.Array
    weight: jax.Array
    terms: dict[str, jax.Array]

    def __add__(self, other: "Totals") -> "Totals":
        """Sums of both, which must have the same terms."""
        if not isinstance(other, Totals):
            return NotImplemented
        if self.terms.keys() != other.terms.keys():
            raise ValueError(
                f"totals with different terms: {sorted(self.terms)} and {sorted(other.terms)}"
            )
        return jax.tree.map(jnp.add, self, other)

    def mean(self) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss and each term per unit of weight; zero where there is no weight at all."""
        weight = jnp.where(self.weight == 0, 1.0, self.weight)
        return self.loss / weight, {name: term / weight for name, term in self.terms.items()}


def check_same_shape(**named: jax.Array | None) -> None:
    """Raises ValueError unless all arrays that are there have one shape."""
    shapes = {name: array.shape for name, array in named.items() if array is not None}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"{listed} differ in shape")


def reduce(
    loss_N: jax.Array, terms: Mapping[str, jax.Array], where: jax.Array | None = None
) -> Totals:
    """Sums per-token values over the tokens that count.

    Args:
      loss_N: [N], or any shape.
      terms: named values of the same shape, for the log; they get no gradient.
      where: the same shape, a mask or weights; every token counts once if it is left out. What a
        token of weight zero holds, be it NaN, changes nothing.

    Returns:
      Totals in float32.

    Raises:
      ValueError: shapes that differ (nothing is broadcast).
    """
    where = jnp.ones(loss_N.shape) if where is None else jnp.asarray(where, jnp.float32)
    where = jax.lax.stop_gradient(where)
    for name, values in {"where": where, **terms}.items():
        if values.shape != loss_N.shape:
            raise ValueError(f"{name} has shape {values.shape}, the loss has {loss_N.shape}")

    def total(values: jax.Array) -> jax.Array:
        return jnp.sum(where * jnp.where(where == 0, 0.0, jnp.asarray(values, jnp.float32)))

    terms = jax.lax.stop_gradient(dict(terms))
    return Totals(
        total(loss_N),
        jnp.sum(where),
        {name: total(values) for name, values in terms.items()},
    )
