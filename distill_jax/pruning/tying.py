"""One matrix for both ends: an untied model's embedding and unembedding fitted by least squares.

A tied student has one matrix M [V, D'] and a gain g [D'] in its final norm; it looks tokens up in
M and multiplies its normed hidden states by diag(g) M^T. With E and U [V, D'] the source's
embedding and unembedding on the kept channels, f_v how often token v is read and h the source's
normed hidden states, over the calibration tokens,

    min_{M, g}   w sum_v f_v |M_v - E_v|^2 / sum_v f_v |E_v|^2
                 + sum_{h, v} (h . (g M_v - U_v))^2 / sum_{h, v} (h . U_v)^2 .

U is taken less its mean over tokens, which no softmax sees. For a given g every token has a
solution of its own, (w' f_v + diag(g) G diag(g)) M_v = w' f_v E_v + diag(g) G U_v with
G = sum h h^T, and one tridiagonal matrix serves all; for a given M, g solves
(G * M^T M) g = diag(G U^T M). The two steps alternate. Without it, a student that keeps the
embedding alone reads its hidden states through a matrix that was never made for them.

Dimensions: B batch, T time, V vocab, D embed; a prime marks what is kept.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distill_jax import models, parallel
from distill_jax.artifacts import InputError
from distill_jax.pruning.activations import Batch, tokens_and_segments
from distill_jax.pruning.elimination import exact_dot
from distill_jax.pruning.least_squares import Sums, solve
from distill_jax.pruning.plan import Plan
from distill_jax.pruning.repair import split_matrices, split_rows
from distill_jax.pruning.tridiagonal import solve_shifted

_ROUNDS = 4
_RESOLVED = 64 * float(jnp.finfo(jnp.float32).eps)
_RIDGE = 1e-6
"""Of the gain, as in `least_squares.solve`; it guards against rounding alone."""


class TyingSums(NamedTuple):
    """Of the calibration tokens, float32: sum of h h^T [D, D], and how often each was read [V]."""

    gram: Array
    counts: Array


def ties(plan: Plan) -> bool:
    """Whether the plan makes one matrix of two."""
    return plan.target.tied and not plan.source.tied


def tying_sums(
    model: models.Model, batches: Iterable[Batch], *, mesh: Mesh | None = None
) -> TyingSums:
    """One forward pass; padding is left out.

    Raises:
      InputError: there are no batches.
    """
    sharding = parallel.batch_sharding(mesh) if mesh else None
    total = None
    for batch in batches:
        tokens, segments = tokens_and_segments(batch, sharding)
        new = batch_sums(model.config, model.params, tokens, segments, mesh)
        total = new if total is None else _add(total, new)
    if total is None:
        raise InputError("there are no calibration batches to fit the tied matrix to")
    return total


def tie(
    plan: Plan,
    params: models.Params,
    sums: TyingSums,
    *,
    weight: float = 0.01,
    mesh: Mesh | None = None,
) -> models.Params:
    """Parameters of the FULL model whose kept embedding and final norm serve both ends.

    Pure and jit-able; `apply_plan`, which drops the unembedding, follows.

    Args:
      plan: what will be kept.
      params: an untied model's parameters.
      sums: of `tying_sums`.
      weight: of the embedding's error beside the logits', w above. What the layers get wrong of a
        wrong embedding they can be taught, by `repair_in_sequence`; after the unembedding there is
        nothing left that could make up for it.
      mesh: where parameters live; tokens are then split over all of it. None leaves that to JAX.
    """

    def split(rows_VD: Array) -> Array:
        if mesh is None:
            return rows_VD
        spec = PartitionSpec(mesh.axis_names)
        return jax.lax.with_sharding_constraint(rows_VD, NamedSharding(mesh, spec))

    kept = plan.embed
    embedding, norm = jnp.asarray(params["embedding"]), jnp.asarray(params["final_norm"])
    # Tokens are split before channels are chosen, among which the parameters are.
    E_VD = split(embedding)[:, kept].astype(jnp.float32)
    U_VD = split(jnp.asarray(params["unembedding"]).T)[:, kept].astype(jnp.float32)
    U_VD = U_VD - jnp.mean(U_VD, axis=0)
    G_DD = sums.gram[kept][:, kept]
    # A token that no calibration row holds is read all the same.
    reads_V = sums.counts + 1
    power = jnp.sum(exact_dot(U_VD.T, U_VD) * G_DD)
    pull_V = reads_V * weight * power / jnp.sum(reads_V * jnp.sum(E_VD**2, axis=1))
    GU_VD = split(exact_dot(U_VD, G_DD))

    def improve(_: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        M_VD = found[0]
        wanted_D1 = jnp.sum(GU_VD * M_VD, axis=0)[:, None]
        gain_D = solve(Sums(G_DD * exact_dot(M_VD.T, M_VD), wanted_D1), _RIDGE, mesh)[:, 0]
        A_DD = gain_D[:, None] * G_DD * gain_D
        # Below what float32 resolves of A, a system without full rank has no solution to find.
        held_V = jnp.maximum(pull_V, _RESOLVED * jnp.linalg.norm(A_DD))
        wanted_VD = held_V[:, None] * E_VD + GU_VD * gain_D
        M_VD = split(solve_shifted(A_DD, held_V, wanted_VD, mesh))
        return M_VD, gain_D

    M_VD, gain_D = jax.lax.fori_loop(0, _ROUNDS, improve, (E_VD, jnp.ones(len(kept))))
    return params | {
        "embedding": split(embedding).at[:, kept].set(M_VD.astype(embedding.dtype)),
        "final_norm": norm.at[kept].multiply(gain_D.astype(norm.dtype)),
    }


@functools.partial(jax.jit, static_argnums=(0, 4))
def batch_sums(
    config: models.LlamaConfig,
    params: models.Params,
    tokens_BT: Array,
    segments_BT: Array,
    mesh: Mesh | None,
) -> TyingSums:
    """Of one batch."""
    where_BT = segments_BT > 0
    # Rows stay split: a matrix of which channels are split would have all tokens gathered.
    rows = parallel.batch_sharding(mesh) if mesh else None
    hidden = models.hidden_states(config, params, tokens_BT, segments_BT, rows=rows)
    hidden = split_rows(hidden, mesh)
    hidden = jnp.where(where_BT[..., None], hidden, 0).astype(jnp.float32)
    gram = jnp.einsum("BTD,BTE->DE", hidden, hidden)
    counts = jnp.zeros(config.vocab_size).at[tokens_BT].add(where_BT)
    return TyingSums(split_matrices(gram, mesh), counts)


@functools.partial(jax.jit, donate_argnums=0)
def _add(total: TyingSums, new: TyingSums) -> TyingSums:
    return jax.tree.map(jnp.add, total, new)
