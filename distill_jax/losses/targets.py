"""What a teacher says about each token, when all of its logits are too many to keep."""

import dataclasses
import functools

import jax


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("ids", "log_probs", "log_tail"),
    meta_fields=("temperature",),
)
@dataclasses.dataclass(frozen=True)
class TopKTargets:
    """The exact probabilities of K ids, and of everything else together.

    The teacher is a distribution over K + 1 outcomes: the K ids and one bucket for the rest of
    the vocabulary. Nothing is renormalised. Any f-divergence (both KLs, Jensen-Shannon, skewed
    KL, total variation) between the bucketed distributions is a lower bound of the one over the
    whole vocabulary, and equals it when K = V.

    Attributes:
      ids: int [..., K], distinct within a token.
      log_probs: float32 [..., K], natural logarithms; -inf marks a padding slot, whose id may be
        anything.
      log_tail: float32 [...], logarithm of the mass outside the ids; may be -inf.
      temperature: the temperature that the teacher's logits were divided by. A loss at another
        temperature refuses these targets.
    """

    ids: jax.Array
    log_probs: jax.Array
    log_tail: jax.Array
    temperature: float = 1.0


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("ids", "weights", "entropy"),
    meta_fields=("temperature",),
)
@dataclasses.dataclass(frozen=True)
class SampledTargets:
    """A few ids drawn so that the teacher's distribution p comes out on average.

    E[sum_k weights_k onehot(ids_k)] = p, as in random sampling of logits (Anshumann et al. 2025,
    arXiv:2503.16870) or threshold sampling (Duffield, Lund, Thorup 2007); the weights of a token
    need not sum to 1. Only what is linear in p can be estimated from it, hence only `forward_kl`.

    Attributes:
      ids: int [..., K]; an id may occur more than once.
      weights: float32 [..., K], not negative; 0 marks a padding slot, whose id may be anything.
      temperature: as in `TopKTargets`.
      entropy: float32 [...], the teacher's entropy in nats at that temperature, if it is known: the
        value of a forward KL is then unbiased too.
    """

    ids: jax.Array
    weights: jax.Array
    temperature: float = 1.0
    entropy: jax.Array | None = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("hidden", "unembedding"),
    meta_fields=("transposed", "embed"),
)
@dataclasses.dataclass(frozen=True)
class LiveTargets:
    """The logits hidden @ unembedding of a teacher that runs beside the student.

    The fused heads alone take them. They make the teacher's logits together with the student's, a
    chunk of tokens at a time, and give them to the objective as an array of logits: whatever takes
    those will do. Neither field receives a gradient.

    Attributes:
      hidden: [N, D], the teacher's final hidden states of the student's tokens; D is its own.
      unembedding: [D, V]. Products are taken in the wider dtype of both.
      transposed: whether the unembedding is [V, D] instead.
      embed: on a mesh, the axes among those of the tokens over which the unembedding's D is split,
        the outermost first; None: those of the student's.
    """

    hidden: jax.Array
    unembedding: jax.Array
    transposed: bool = False
    embed: tuple[str, ...] | None = None


Teacher = jax.Array | TopKTargets | SampledTargets
"""What a divergence compares with: logits [..., V], or what was stored of them."""
