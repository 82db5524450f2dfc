"""Divergences between a teacher p and a student q, per token.

Every function here takes the student first and returns float32 nats (total variation: a fraction)
times temperature squared, which keeps the size of a KL's gradient as the temperature changes
(Hinton et al. 2015). Both sides are softened: p = softmax(teacher / T), q = softmax(student / T).

- The student is an array of logits [..., V].
- The teacher is an array of logits of the same shape, `TopKTargets` or (forward KL alone)
  `SampledTargets`, with the student's leading axes. It never receives a gradient.
- `TopKTargets` are compared over K + 1 outcomes, the ids and one bucket for the rest: a lower
  bound of the whole divergence, unless a function says otherwise, and equal to it at K = V.
- An outcome that one side rules out (a logit of -inf) costs the other at most -LOG_FLOOR nats per
  unit of mass instead of infinity; ruled out by both it costs nothing.

A temperature is a number above 0 or, for logits, a JAX scalar, whose range is not checked.

All raise TypeError for targets that cannot give the divergence, naming what can, and ValueError
for shapes that do not fit, for targets stored at another temperature and for parameters out of
range.
"""

import math

import jax
import jax.numpy as jnp

from distill_jax.losses import sparse
from distill_jax.losses.targets import SampledTargets, Teacher, TopKTargets

LOG_FLOOR = -1e5
"""Stands for log 0 where its true value would make a loss infinite: below the logarithms that
finite logits give (1e4 apart at T = 0.2), far above those that make sums overflow."""


def forward_kl(
    student_logits: jax.Array, teacher: Teacher, *, temperature: float = 1.0
) -> jax.Array:
    """T^2 KL(p || q) = T^2 sum p log(p / q).

    With `SampledTargets` it is T^2 (-H - sum_k w_k log q[id_k]), H the teacher's entropy. Since
    E[w] = p, value and gradient are unbiased estimates of forward KL's (and the gradient sums to
    zero over the vocabulary, as that one does). Targets that do not know their entropy have
    sum_k w_k log w_k instead of -H, which is more on average, and changes no gradient.

    Returns:
      float32 [...].
    """
    _check(student_logits, teacher, temperature)
    if isinstance(teacher, SampledTargets):
        return temperature**2 * _sampled_kl(sparse.soften(student_logits, temperature), teacher)
    log_p, log_q = _outcomes(student_logits, teacher, temperature, "forward_kl")
    return temperature**2 * _kl(log_p, jnp.where(jnp.isneginf(log_q), LOG_FLOOR, log_q))


def reverse_kl(
    student_logits: jax.Array, teacher: Teacher, *, temperature: float = 1.0
) -> jax.Array:
    """T^2 KL(q || p) = T^2 sum q log(q / p); seeks a mode (MiniLLM, Gu et al. 2024).

    Returns:
      float32 [...].
    """
    log_p, log_q = _outcomes(student_logits, teacher, temperature, "reverse_kl")
    return temperature**2 * _kl(log_q, jnp.maximum(log_p, LOG_FLOOR))


def jensen_shannon(
    student_logits: jax.Array, teacher: Teacher, *, beta: float = 0.5, temperature: float = 1.0
) -> jax.Array:
    """T^2 [b KL(p || m) + (1 - b) KL(q || m)], m = b p + (1 - b) q (GKD, Agarwal et al. 2024).

    Divided by b it tends to forward KL as b -> 0, and divided by 1 - b to reverse KL as b -> 1.

    Args:
      student_logits: see the module.
      teacher: see the module.
      beta: the teacher's share b of the mixture, in (0, 1).
      temperature: see the module.

    Returns:
      float32 [...].
    """
    _check_open_unit("beta", beta)
    log_p, log_q = _outcomes(student_logits, teacher, temperature, "jensen_shannon")
    log_m = _mix(log_p, log_q, beta)
    return temperature**2 * (beta * _kl(log_p, log_m) + (1.0 - beta) * _kl(log_q, log_m))


def skewed_forward_kl(
    student_logits: jax.Array, teacher: Teacher, *, alpha: float = 0.1, temperature: float = 1.0
) -> jax.Array:
    """T^2 KL(p || a p + (1 - a) q) (DistiLLM, Ko et al. 2024); at most -T^2 log a.

    Args:
      student_logits: see the module.
      teacher: see the module.
      alpha: the teacher's share a of the mixture, in (0, 1); its limit 0 is `forward_kl`.
      temperature: see the module.

    Returns:
      float32 [...].
    """
    _check_open_unit("alpha", alpha)
    log_p, log_q = _outcomes(student_logits, teacher, temperature, "skewed_forward_kl")
    return temperature**2 * _kl(log_p, _mix(log_p, log_q, alpha))


def skewed_reverse_kl(
    student_logits: jax.Array, teacher: Teacher, *, alpha: float = 0.1, temperature: float = 1.0
) -> jax.Array:
    """T^2 KL(q || (1 - a) p + a q) (DistiLLM, Ko et al. 2024); at most -T^2 log a.

    Args:
      student_logits: see the module.
      teacher: see the module.
      alpha: the student's share a of the mixture, in (0, 1); its limit 0 is `reverse_kl`.
      temperature: see the module.

    Returns:
      float32 [...].
    """
    _check_open_unit("alpha", alpha)
    log_p, log_q = _outcomes(student_logits, teacher, temperature, "skewed_reverse_kl")
    return temperature**2 * _kl(log_q, _mix(log_q, log_p, alpha))


def alpha_beta_divergence(
    student_logits: jax.Array,
    teacher: Teacher,
    *,
    alpha: float = 0.2,
    beta: float = 0.7,
    temperature: float = 1.0,
) -> jax.Array:
    """-T^2 / (a b) sum [p^a q^b - a / (a + b) p^(a + b) - b / (a + b) q^(a + b)] (ABKD, 2025).

    a = 1, b -> 0 is forward KL; a -> 0, b = 1 is reverse KL. Over the outcomes of `TopKTargets` it
    bounds the whole divergence from neither side unless a + b = 1.

    Args:
      student_logits: see the module.
      teacher: see the module.
      alpha: exponent a of the teacher, above 0.
      beta: exponent b of the student, above 0.
      temperature: see the module.

    Returns:
      float32 [...].
    """
    if not (alpha > 0 and beta > 0):
        raise ValueError(
            f"alpha and beta must be above 0, got {alpha} and {beta}; for the limits use "
            "forward_kl (alpha 1, beta 0) or reverse_kl (alpha 0, beta 1)"
        )
    log_p, log_q = _outcomes(student_logits, teacher, temperature, "alpha_beta_divergence")
    both = alpha + beta
    summands = (
        alpha / both * jnp.exp(both * log_p)
        + beta / both * jnp.exp(both * log_q)
        - jnp.exp(alpha * log_p + beta * log_q)
    )
    return temperature**2 / (alpha * beta) * jnp.sum(summands, axis=-1)


def adaptive_kl(
    student_logits: jax.Array,
    teacher: Teacher,
    *,
    head_mass: float = 0.5,
    temperature: float = 1.0,
) -> jax.Array:
    """T^2 [w KL(p || q) + (1 - w) KL(q || p)] with w by token (Wu et al. 2024).

    The teacher's likeliest outcomes, until they hold `head_mass`, are the head (equals are taken
    together), the rest is the tail; w is the head's share of sum |p - q|, and constant for the
    gradient. The bucket of `TopKTargets` belongs to the tail; the value is then an approximation,
    not a bound.

    Args:
      student_logits: see the module.
      teacher: see the module.
      head_mass: the teacher's mass in the head, in (0, 1).
      temperature: see the module.

    Returns:
      float32 [...].
    """
    _check_open_unit("head_mass", head_mass)
    log_p, log_q = _outcomes(student_logits, teacher, temperature, "adaptive_kl")
    p = jnp.exp(log_p)
    if isinstance(teacher, TopKTargets):
        head = jnp.pad(_head(p[..., :-1], head_mass), [(0, 0)] * (p.ndim - 1) + [(0, 1)])
    else:
        head = _head(p, head_mass)
    gap = jnp.abs(p - jnp.exp(jax.lax.stop_gradient(log_q)))
    # Both shares are summed: 1 - weight would lose the digits of a small one, beside 1e5 nats.
    head_gap = jnp.sum(jnp.where(head, gap, 0.0), axis=-1)
    tail_gap = jnp.sum(jnp.where(head, 0.0, gap), axis=-1)
    all_gap = head_gap + tail_gap
    all_gap = jnp.where(all_gap > 0, all_gap, 1.0)
    forward = _kl(log_p, jnp.where(jnp.isneginf(log_q), LOG_FLOOR, log_q))
    reverse = _kl(log_q, jnp.maximum(log_p, LOG_FLOOR))
    return temperature**2 * (head_gap / all_gap * forward + tail_gap / all_gap * reverse)


def total_variation(
    student_logits: jax.Array, teacher: Teacher, *, temperature: float = 1.0
) -> jax.Array:
    """T^2 / 2 sum |p - q|; between 0 and T^2 (Wen et al. 2023).

    Returns:
      float32 [...].
    """
    log_p, log_q = _outcomes(student_logits, teacher, temperature, "total_variation")
    return temperature**2 * 0.5 * jnp.sum(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)), axis=-1)


def interpolate_logits(
    student_logits: jax.Array, teacher_logits: jax.Array, fraction: float | jax.Array
) -> jax.Array:
    """(1 - t) student + t teacher without gradient: the moving teacher of TAID (Shing et al. 2025).

    Args:
      student_logits: [..., V].
      teacher_logits: [..., V].
      fraction: scalar t in [0, 1], rising in training. The side of weight zero changes nothing,
        even where it is infinite.

    Returns:
      float32 [..., V], to be the teacher in a divergence.

    Raises:
      ValueError: shapes that differ.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits {student_logits.shape} and teacher logits {teacher_logits.shape} "
            "differ in shape"
        )
    student = jnp.asarray(student_logits, jnp.float32)
    teacher = jnp.asarray(teacher_logits, jnp.float32)
    mixed = jnp.where(fraction < 1, (1 - fraction) * student, 0.0) + jnp.where(
        fraction > 0, fraction * teacher, 0.0
    )
    return jax.lax.stop_gradient(mixed)


def _check(student_logits: jax.Array, teacher: Teacher, temperature: float) -> None:
    """Refuses what does not fit together."""
    traced = isinstance(temperature, jax.Array)
    if not traced and not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if not isinstance(teacher, TopKTargets | SampledTargets):
        if not hasattr(teacher, "shape"):
            raise TypeError(
                "teacher must be an array of logits, TopKTargets or SampledTargets, "
                f"got {type(teacher).__name__}"
            )
        if teacher.shape != student_logits.shape:
            raise ValueError(
                f"teacher logits {teacher.shape} do not fit student logits {student_logits.shape}"
            )
        return
    kind = type(teacher).__name__
    if traced or teacher.temperature != temperature:
        wanted = "an array as temperature" if traced else f"a loss at temperature {temperature}"
        raise ValueError(
            f"{kind} stored at temperature {teacher.temperature} cannot serve {wanted}: store "
            "them again or change the loss"
        )
    leading = student_logits.shape[:-1]
    values = teacher.log_probs if isinstance(teacher, TopKTargets) else teacher.weights
    of_token = teacher.log_tail if isinstance(teacher, TopKTargets) else teacher.entropy
    fits = of_token is None or of_token.shape == leading
    if teacher.ids.shape[:-1] != leading or values.shape != teacher.ids.shape or not fits:
        raise ValueError(
            f"{kind} with ids {teacher.ids.shape} and values {values.shape} do not fit student "
            f"logits {student_logits.shape}"
        )


def _check_open_unit(name: str, value: float) -> None:
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name} must be between 0 and 1 (exclusive), got {value}")


def _outcomes(
    student_logits: jax.Array, teacher: Teacher, temperature: float, divergence: str
) -> tuple[jax.Array, jax.Array]:
    """log p and log q over the same outcomes: V ids, or K ids and the bucket of the others."""
    _check(student_logits, teacher, temperature)
    if isinstance(teacher, SampledTargets):
        raise TypeError(
            f"{divergence} cannot be estimated from SampledTargets, because it is not linear in "
            "the teacher's probabilities: use forward_kl, or store TopKTargets or logits"
        )
    student = sparse.soften(student_logits, temperature)
    if not isinstance(teacher, TopKTargets):
        softened = jax.lax.stop_gradient(sparse.soften(teacher, temperature))
        return _log_normalised(softened), _log_normalised(student)
    log_probs = jax.lax.stop_gradient(jnp.asarray(teacher.log_probs, jnp.float32))
    log_tail = jax.lax.stop_gradient(jnp.asarray(teacher.log_tail, jnp.float32))
    listed = jnp.logical_not(jnp.isneginf(log_probs))
    picked, log_rest = sparse.pick(
        student, jnp.where(listed, jnp.asarray(teacher.ids, jnp.int32), -1), True
    )
    picked = jnp.where(listed, picked, -jnp.inf)
    log_p = jnp.concatenate([log_probs, log_tail[..., None]], axis=-1)
    return log_p, jax.nn.log_softmax(jnp.concatenate([picked, log_rest[..., None]], axis=-1))


def _log_normalised(softened: jax.Array) -> jax.Array:
    """log softmax of what `sparse.soften` gives, whose largest is 0."""
    return softened - jnp.log(jnp.sum(jnp.exp(softened), axis=-1, keepdims=True))


def _sampled_kl(student: jax.Array, teacher: SampledTargets) -> jax.Array:
    weights = jax.lax.stop_gradient(jnp.asarray(teacher.weights, jnp.float32))
    drawn = weights > 0
    picked, log_z = sparse.pick(student, teacher.ids)
    log_q = jnp.where(drawn, picked, 0.0) - log_z[..., None]
    log_q = jnp.where(jnp.isneginf(log_q), LOG_FLOOR, log_q)
    if teacher.entropy is None:
        known = jnp.sum(weights * jnp.log(jnp.where(drawn, weights, 1.0)), axis=-1)
    else:
        known = -jax.lax.stop_gradient(jnp.asarray(teacher.entropy, jnp.float32))
    return known - jnp.sum(weights * log_q, axis=-1)


def _kl(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
    """sum a log(a / b), where 0 log 0 = 0."""
    a = jnp.exp(log_a)
    return jnp.sum(a * jnp.where(a > 0, log_a - log_b, 0.0), axis=-1)


def _mix(log_a: jax.Array, log_b: jax.Array, share: float) -> jax.Array:
    """log(share a + (1 - share) b); the floor keeps its gradient finite where a = b = 0."""
    log_a, log_b = jnp.maximum(log_a, LOG_FLOOR), jnp.maximum(log_b, LOG_FLOOR)
    return jnp.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def _head(p: jax.Array, mass: float) -> jax.Array:
    """Which outcomes are among the likeliest that hold `mass` together.

    An outcome is in the head if those likelier than it hold less than `mass`. The least likely
    such probability is found by halving the range of its bits: that needs sums alone, where a sort
    of the vocabulary is slow, and gathers it when it is sharded.
    """
    bits = jax.lax.bitcast_convert_type(p, jnp.int32)  # in the same order, for p >= 0

    def halve(_, bounds):
        low, high = bounds  # the least bits of the head are in [low, high]
        middle = (low + high) // 2
        likelier = jnp.sum(jnp.where(bits > middle[..., None], p, 0.0), axis=-1)
        return jnp.where(likelier < mass, low, middle + 1), jnp.where(likelier < mass, middle, high)

    _, least = jax.lax.fori_loop(0, 31, halve, (jnp.min(bits, axis=-1), jnp.max(bits, axis=-1)))
    return bits >= least[..., None]
