"""Cross-entropy with the corpus's own next token."""

import jax
import jax.numpy as jnp

from distill_jax.losses import sparse


def cross_entropy(
    student_logits: jax.Array,
    labels: jax.Array,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """(1 - s) (-log q[label]) + s mean_v(-log q[v]) + z_loss (log Z)^2, per token, in nats.

    q = softmax(student_logits), Z its normaliser. The z-loss keeps log Z near zero (PaLM,
    Chowdhery et al. 2022, section 5); label smoothing s is Szegedy et al. 2016.

    Args:
      student_logits: [..., V].
      labels: int [...]. A label outside [0, V) makes its own token's loss NaN, and nothing else's:
        leave such tokens out in the reduction. Infinite where the label's logit is -inf, or with
        smoothing any logit.
      z_loss: weight of (log Z)^2.
      label_smoothing: share of the target that is spread evenly over the vocabulary, in [0, 1).

    Returns:
      float32 [...].

    Raises:
      ValueError: shapes that do not fit, or a label smoothing outside [0, 1).
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    picked, log_z, softened = _label_logit(student_logits, labels)
    loss = log_z - picked
    if label_smoothing:
        uniform = log_z - jnp.mean(softened, axis=-1)
        loss = (1.0 - label_smoothing) * loss + label_smoothing * uniform
    if z_loss:
        loss = loss + z_loss * jnp.square(log_z + sparse.largest(student_logits))
    return loss


def token_log_probs(logits_NV: jax.Array, labels_N: jax.Array) -> jax.Array:
    """log softmax(logits)[label] per token: what `dpo` sums over a completion.

    Args:
      logits_NV: [N, V], or any leading axes.
      labels_N: int, the same leading axes. A label outside [0, V) gives NaN for its token.

    Returns:
      float32 [N].

    Raises:
      ValueError: shapes that do not fit.
    """
    picked, log_z, _ = _label_logit(logits_NV, labels_N)
    return picked - log_z


def _label_logit(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The label's logit, log Z and all logits, less the largest one."""
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels {labels.shape} do not fit logits {logits.shape}")
    softened = sparse.soften(logits)
    picked, log_z = sparse.pick(softened, labels[..., None])
    return picked[..., 0], log_z, softened
