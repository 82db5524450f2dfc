"""How far what a scheme keeps of a token lies from the whole distribution."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import scipy.special

from distill_jax import losses, teachers


@dataclasses.dataclass(frozen=True)
class Entry:
    """One scheme that is measured.

    Attributes:
      group: those to be compared, such as "10 ids".
      scheme: which.
      alone: of top-k, whether the ids are taken for all there is, renormalised.
    """

    group: str
    scheme: teachers.Scheme
    alone: bool = False

    def targets(self, arrays: Mapping[str, Any]) -> losses.TopKTargets | losses.SampledTargets:
        targets = self.scheme.targets(self.scheme.unpack(arrays), 1.0)
        if not self.alone:
            return targets
        weights = scipy.special.softmax(targets.log_probs, axis=-1)
        return losses.SampledTargets(targets.ids, weights)

    @property
    def label(self) -> str:
        given = teachers.scheme_to_json(self.scheme).items()
        parts = (f"{k} {v:.4g}" for k, v in given if k != "name" and v is not None)
        return f"{self.scheme.name} {', '.join(parts)}{' alone' if self.alone else ''}"


class Dense(NamedTuple):
    """Probabilities of teacher and student, [N, V], their products, [N], and sums of p, [V]."""

    p_NV: jax.Array
    q_NV: jax.Array
    pp_N: jax.Array
    pq_N: jax.Array
    qq_N: jax.Array
    p_V: jax.Array


@jax.jit
def dense(teacher_NV: jax.Array, student_NV: jax.Array) -> Dense:
    p_NV, q_NV = jax.nn.softmax(teacher_NV), jax.nn.softmax(student_NV)
    products = ((a * b).sum(-1) for a, b in ((p_NV, p_NV), (p_NV, q_NV), (q_NV, q_NV)))
    return Dense(p_NV, q_NV, *products, p_NV.sum(0))


@jax.jit
def errors(
    targets: losses.TopKTargets | losses.SampledTargets, of: Dense
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """|w - p|^2 and the squared error of `losses.forward_kl`'s gradient, [N]; sum of w - p, [V].

    Of samples only ids that are kept are looked at: what others add is known from sums over all.
    """
    ids = targets.ids
    p_NK = jnp.take_along_axis(of.p_NV, ids, axis=-1)
    if isinstance(targets, losses.SampledTargets):
        weights = targets.weights
        q_NK = jnp.take_along_axis(of.q_NV, ids, axis=-1)
        kept_NK = jnp.where(weights > 0, p_NK, 0)
        error_N = of.pp_N + (jnp.square(weights - kept_NK) - jnp.square(kept_NK)).sum(-1)
        excess_N = weights.sum(-1) - 1
        along_N = (weights * q_NK).sum(-1) - of.pq_N
        gradient_N = error_N - 2 * excess_N * along_N + jnp.square(excess_N) * of.qq_N
        return error_N, gradient_N, (-of.p_V).at[ids].add(weights)
    # The ids kept have no error, the others share the bucket as q does: (scale q - p). Where q has
    # little left for them, a difference of sums would not do.
    q_NV = jax.vmap(lambda row, ids: row.at[ids].set(0.0))(of.q_NV, ids)
    scale_N = jnp.exp(targets.log_tail) / q_NV.sum(-1)
    pp_N = of.pp_N - jnp.square(p_NK).sum(-1)
    pq_N, qq_N = (of.p_NV * q_NV).sum(-1), jnp.square(q_NV).sum(-1)
    error_N = jnp.maximum(pp_N - 2 * scale_N * pq_N + jnp.square(scale_N) * qq_N, 0)
    return error_N, error_N, (scale_N @ q_NV - of.p_V).at[ids].add(p_NK)
