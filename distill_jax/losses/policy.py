"""Losses on text that the student sampled: GKD and MiniLLM.

GKD compares the distributions at every token of a completion and ignores that a token also decides
which prefixes follow. MiniLLM (Gu et al. 2024) minimises the reverse KL of whole completions
y ~ q, with p the teacher and q the student. Its gradient is exactly

    E sum_t [ grad KL(q(.|y<t) || p(.|y<t)) - R_t+1 grad log q(y_t|y<t) ],
    R_t+1 = sum of r_s over s > t,  r_s = log p(y_s|y<s) - log q(y_s|y<s):

a single-step term, exact over the vocabulary, and a long-horizon term. One round of training:

    # 1. sample: from softmax(mix_log_probs(log q, log p)) over the vocabulary, or from q itself
    # 2. score the tokens, log-probabilities [B, T] by `token_log_probs` of q and of p
    mixed_BT = mix_log_probs(student_BT, teacher_BT)           # student_BT itself, if from q
    # 3. once a round
    targets = {
        "labels": tokens_BT,
        "old_log_probs": student_BT,
        "weights": importance_weights(student_BT, mixed_BT, where_BT),
        "advantages": minillm_advantages(student_BT, teacher_BT, where_BT),
        "teacher": teacher_logits_BTV,
    }
    # 4. for some epochs; or `fused_linear` with the same objective on flattened tokens
    totals = reduce(*minillm("teacher")(logits_BTV, targets), where_BT)

Everything but the objectives carries no gradient. where_BT [B, T] is the mask of completion
tokens: what any other token holds, be it NaN, changes nothing. All work at temperature 1 (a policy
gradient needs the log-probabilities of the distribution that was sampled from) and raise ValueError
for shapes that differ and parameters out of range.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.losses import divergences, labels, objectives
from distill_jax.losses.reduction import check_same_shape, reduce
from distill_jax.losses.targets import Teacher

_MAX_LOG_RATIO = 80.0  # exp of it is finite in float32; only a mismatch of models goes beyond


def gkd(
    student_logits: jax.Array, teacher: Teacher, *, beta: float = 0.5, temperature: float = 1.0
) -> jax.Array:
    """Divergence of GKD (Agarwal et al. 2024): `jensen_shannon`, and a KL at either end.

    beta = 0 is `forward_kl`, beta = 1 is `reverse_kl`. Those are limits of jensen_shannon divided
    by beta and by 1 - beta, so the loss jumps at the ends: at beta = 0.01 it is about a hundredth
    of forward KL. Beta is the teacher's share of the mixture, as in the paper and TRL's
    `generalized_jsd_loss` (TRL's first one exchanged the weights of the two KLs); unlike TRL's it
    is multiplied by T^2. Use it as `distill(name, gkd, beta=...)` with a mask in the reduction.

    Args:
      student_logits: [..., V], at tokens of completions by the student or from data.
      teacher: logits, `TopKTargets` or (beta = 0 alone) `SampledTargets`.
      beta: in [0, 1].
      temperature: softens both sides.

    Returns:
      float32 [...].

    Raises:
      ValueError, TypeError: as the divergences; a beta out of range.
    """
    if beta == 0:
        return divergences.forward_kl(student_logits, teacher, temperature=temperature)
    if beta == 1:
        return divergences.reverse_kl(student_logits, teacher, temperature=temperature)
    return divergences.jensen_shannon(student_logits, teacher, beta=beta, temperature=temperature)


def mix_log_probs(
    student_log_probs: jax.Array, teacher_log_probs: jax.Array, *, teacher_share: float = 0.2
) -> jax.Array:
    """log(a p + (1 - a) q): MiniLLM's teacher-mixed sampler, against degenerate samples.

    Args:
      student_log_probs: log q of the whole vocabulary (to sample) or of sampled tokens (to score).
      teacher_log_probs: log p of the same.
      teacher_share: a in [0, 1).

    Returns:
      float32, the same shape, without gradient.
    """
    if not 0.0 <= teacher_share < 1.0:
        raise ValueError(f"teacher_share must be in [0, 1), got {teacher_share}")
    check_same_shape(student=student_log_probs, teacher=teacher_log_probs)
    student = jnp.asarray(student_log_probs, jnp.float32)
    teacher = jnp.asarray(teacher_log_probs, jnp.float32)
    mixed = student
    if teacher_share:
        mixed = jnp.logaddexp(
            teacher + math.log(teacher_share), student + math.log1p(-teacher_share)
        )
    return jax.lax.stop_gradient(mixed)


def importance_weights(
    student_log_probs_BT: jax.Array,
    sampler_log_probs_BT: jax.Array,
    where_BT: jax.Array,
    *,
    whole_sequence: bool = False,
) -> jax.Array:
    """w = q / q_sampler of each token, or of its whole completion.

    A completion's weight makes MiniLLM's expected gradient exact, but it is a product of T ratios:
    its variance grows exponentially with length. MiniLLM takes the token's own ratio, at most
    1 / (1 - teacher_share). That gives up two things: prefixes come as often as the sampler visits
    them rather than the student, and what follows a token, hence its return, is the sampler's.

    Args:
      student_log_probs_BT: [B, T], of the sampled tokens under the student.
      sampler_log_probs_BT: [B, T], under what they were sampled from.
      where_BT: [B, T], mask of completion tokens.
      whole_sequence: whether a token has the weight of its whole completion.

    Returns:
      float32 [B, T] without gradient, 0 outside completions; all 1 inside if the student sampled.
    """
    check_same_shape(student=student_log_probs_BT, sampler=sampler_log_probs_BT, where=where_BT)
    counts = where_BT != 0
    log_weights = jnp.where(
        counts,
        jnp.asarray(student_log_probs_BT, jnp.float32)
        - jnp.asarray(sampler_log_probs_BT, jnp.float32),
        0.0,
    )
    if whole_sequence:
        log_weights = jnp.sum(log_weights, axis=-1, keepdims=True)
    weights = jnp.exp(jnp.minimum(log_weights, _MAX_LOG_RATIO))
    return jax.lax.stop_gradient(jnp.where(counts, weights, 0.0))


def returns_to_go(
    rewards_BT: jax.Array, where_BT: jax.Array, *, length_normalize: bool = True
) -> jax.Array:
    """R_t+1: the sum, or the mean, of the rewards of a completion's tokens after token t.

    A token's own reward is left out: it is the single-step term's. (MiniLLM's published code keeps
    it in, divides by one token more to match, and discounts by 0.95; its paper does not.) The mean
    keeps a model from gaining by being short.

    Args:
      rewards_BT: [B, T].
      where_BT: [B, T], mask of completion tokens.
      length_normalize: whether to divide by the number of tokens after t.

    Returns:
      float32 [B, T], 0 for a completion's last token and outside completions.
    """
    check_same_shape(rewards=rewards_BT, where=where_BT)
    counts = where_BT != 0

    def after(values_BT: jax.Array) -> jax.Array:
        from_here = jax.lax.cumsum(values_BT, axis=1, reverse=True)
        return jnp.pad(from_here[:, 1:], ((0, 0), (0, 1)))

    returns = after(jnp.where(counts, jnp.asarray(rewards_BT, jnp.float32), 0.0))
    if length_normalize:
        returns = returns / jnp.maximum(after(counts.astype(jnp.float32)), 1.0)
    return jnp.where(counts, returns, 0.0)


def whiten(values_BT: jax.Array, where_BT: jax.Array) -> jax.Array:
    """(values - mean) / standard deviation over all tokens of the batch that count, else 0.

    Under `jax.jit` the batch is that of all devices; inside `jax.shard_map` it is one device's.

    Args:
      values_BT: [B, T].
      where_BT: [B, T], mask or weights.

    Returns:
      float32 [B, T].
    """
    counts = where_BT != 0
    values = jnp.asarray(values_BT, jnp.float32)
    centred = values - reduce(values, {}, where_BT).mean()[0]
    variance = reduce(jnp.square(centred), {}, where_BT).mean()[0]
    return jnp.where(counts, centred * jax.lax.rsqrt(variance + 1e-8), 0.0)


def minillm_advantages(
    student_log_probs_BT: jax.Array,
    teacher_log_probs_BT: jax.Array,
    where_BT: jax.Array,
    *,
    reward_clip: float = 100.0,
    length_normalize: bool = True,
    whitening: bool = True,
) -> jax.Array:
    """`returns_to_go` of the rewards log p - log q, clipped to +- `reward_clip`, then `whiten`ed.

    Without the clip (infinity), the normalisation and the whitening, they are the R_t+1 of the
    exact gradient.

    Args:
      student_log_probs_BT: [B, T], log q of the sampled tokens when they were sampled.
      teacher_log_probs_BT: [B, T], log p of them.
      where_BT: [B, T], mask of completion tokens.
      reward_clip: in nats, above 0.
      length_normalize: see `returns_to_go`.
      whitening: whether to bring the batch to mean 0 and variance 1. Subtracting a mean changes no
        expected gradient when the student sampled; dividing changes its size.

    Returns:
      float32 [B, T] without gradient, 0 outside completions.
    """
    if not reward_clip > 0:
        raise ValueError(f"reward_clip must be above 0, got {reward_clip}")
    check_same_shape(student=student_log_probs_BT, teacher=teacher_log_probs_BT, where=where_BT)
    rewards = jnp.asarray(teacher_log_probs_BT, jnp.float32) - jnp.asarray(
        student_log_probs_BT, jnp.float32
    )
    rewards = jnp.clip(rewards, -reward_clip, reward_clip)
    advantages = returns_to_go(rewards, where_BT, length_normalize=length_normalize)
    if whitening:
        advantages = whiten(advantages, where_BT)
    return jax.lax.stop_gradient(advantages)


def clipped_surrogate(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    *,
    clip: float = 0.2,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """-min(ratio A, clamp(ratio, 1 - clip, 1 + clip) A), ratio = q / q_old (PPO, Schulman 2017).

    At ratio 1 its gradient is -A grad log q. A token whose ratio has gone beyond the clip in the
    direction of its advantage has no gradient.

    Args:
      log_probs: of sampled tokens under the student that is trained, any shape.
      old_log_probs: the same under the student before the first of these epochs.
      advantages: the same shape.
      clip: above 0; infinity never clips.

    Returns:
      float32 loss of that shape, and the terms "ratio" and "clipped" (1 where the clip took the
      gradient away).
    """
    if not clip > 0:
        raise ValueError(f"clip must be above 0, got {clip}")
    check_same_shape(log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages)
    advantages, old_log_probs = jax.lax.stop_gradient(
        (jnp.asarray(advantages, jnp.float32), jnp.asarray(old_log_probs, jnp.float32))
    )
    log_ratio = jnp.asarray(log_probs, jnp.float32) - old_log_probs
    ratio = jnp.exp(jnp.minimum(log_ratio, _MAX_LOG_RATIO))
    clamped = jnp.clip(jax.lax.stop_gradient(ratio), 1.0 - clip, 1.0 + clip)
    clipped = ratio * advantages > clamped * advantages
    loss = -advantages * jnp.where(clipped, clamped, ratio)
    return loss, jax.lax.stop_gradient({"ratio": ratio, "clipped": clipped.astype(jnp.float32)})


def minillm(name: str, *, clip: float = 0.2) -> objectives.Objective:
    """w [KL(q || p) + clipped_surrogate(log q(label), old, A)]: MiniLLM (Gu et al. 2024).

    Its gradient is MiniLLM's (see the module), its value means nothing. The weight stands outside
    the clip. (The published code clips w * ratio instead and leaves the first summand unweighted:
    pass the sampler's log-probabilities as "old_log_probs" and the mask as "weights" for that.)
    MiniLLM adds cross-entropy on pre-training text, which has a batch and a reduction of its own.

    It reads targets[name], the teacher, and "labels", "old_log_probs", "advantages" and "weights",
    all of the logits' leading axes. A token of weight 0 has no gradient, whatever it holds.

    Args:
      name: the teacher's name; its targets are logits or `TopKTargets`.
      clip: see `clipped_surrogate`.

    Returns:
      An objective with the terms "single_step" (the unweighted KL), "ratio" and "clipped".
    """

    def objective(logits_NV, targets, *, step=None):
        del step
        teacher, labels_N = objectives.lookup(targets, name), objectives.lookup(targets, "labels")
        old_N, advantages_N, weights_N = _rollout(logits_NV, targets)
        # Cut off before anything is computed: further on, no gradient times NaN would be NaN.
        logits_NV = jnp.where((weights_N > 0)[..., None], logits_NV, 0.0)
        log_probs_N = labels.token_log_probs(logits_NV, labels_N)
        single_N = divergences.reverse_kl(logits_NV, teacher)
        long_N, terms = clipped_surrogate(log_probs_N, old_N, advantages_N, clip=clip)
        return weights_N * (single_N + long_N), {"single_step": single_N, **terms}

    return objective


def _rollout(
    logits_NV: jax.Array, targets: Mapping[str, Any]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    found = {
        key: objectives.lookup(targets, key) for key in ("old_log_probs", "advantages", "weights")
    }
    for key, values in found.items():
        if values.shape != logits_NV.shape[:-1]:
            raise ValueError(f"{key} {values.shape} does not fit logits {logits_NV.shape}")
    return tuple(jax.lax.stop_gradient(list(found.values())))
