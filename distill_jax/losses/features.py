"""Feature losses: how far the student's hidden state is from the teacher's, per token.

They guide a student that has lost many of its layers; after milder cuts, logits alone do as well
(Minitron, Muralidharan et al. 2024).

- Hidden states are [..., D], one for each token. The teacher never receives a gradient.
- A projection [D_student, D_teacher] takes the student to the teacher's width. It is learnt with
  the student and thrown away afterwards; a natural start for a pruned student has ones where a
  channel meets the one it was, and zeros elsewhere. Equal widths need none.
- `where` [...] says which tokens count; the others are 0 and change no gradient, that of the
  projection included, even where they hold NaN. Pass it here as well as to `reduce`.

All return float32 [...] and raise ValueError for shapes that do not fit.
"""

import jax
import jax.numpy as jnp

_SHORTEST = 1e-10
"""A vector shorter than this counts as zero."""


def hidden_mse(
    student_hidden: jax.Array,
    teacher_hidden: jax.Array,
    projection: jax.Array | None = None,
    *,
    relative: bool = False,
    where: jax.Array | None = None,
) -> jax.Array:
    """mean_d (s W - t)_d^2, or that over mean_d t_d^2 (TinyBERT, Jiao et al. 2020).

    Args:
      student_hidden: [..., D_student].
      teacher_hidden: [..., D_teacher].
      projection: W [D_student, D_teacher].
      relative: divide by the teacher's mean square, which makes layers and tokens of very different
        size alike: 0 is a perfect fit, 1 is as good as s W = 0. A teacher of all zeros counts as
        having mean square 1.
      where: see the module.

    Returns:
      float32 [...], in squared units of the teacher's hidden state, or a fraction of its square.
    """
    student, teacher = _aligned(student_hidden, teacher_hidden, projection, where)
    error = jnp.mean(jnp.square(student - teacher), axis=-1)
    if relative:
        size = jnp.mean(jnp.square(teacher), axis=-1)
        error = error / jnp.where(size > 0, size, 1.0)
    return error


def hidden_cosine(
    student_hidden: jax.Array,
    teacher_hidden: jax.Array,
    projection: jax.Array | None = None,
    *,
    where: jax.Array | None = None,
) -> jax.Array:
    """1 - cos(s W, t), in [0, 2] (DistilBERT, Sanh et al. 2019, without a projection).

    A vector of zeros has no direction: its loss is 1 and its gradient 0.

    Args:
      student_hidden: [..., D_student].
      teacher_hidden: [..., D_teacher].
      projection: W [D_student, D_teacher].
      where: see the module.

    Returns:
      float32 [...].
    """
    student, teacher = _aligned(student_hidden, teacher_hidden, projection, where)
    distance = 1.0 - jnp.sum(_direction(student) * _direction(teacher), axis=-1)
    return distance if where is None else jnp.where(where == 0, 0.0, distance)


def _aligned(
    student_hidden: jax.Array,
    teacher_hidden: jax.Array,
    projection: jax.Array | None,
    where: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Both in float32 and at the teacher's width, with zeros in the tokens that do not count."""
    leading = student_hidden.shape[:-1]
    widths = (student_hidden.shape[-1], teacher_hidden.shape[-1])
    if teacher_hidden.shape[:-1] != leading:
        raise ValueError(
            f"student hidden {student_hidden.shape} and teacher hidden {teacher_hidden.shape} are "
            "not of the same tokens"
        )
    if projection is None and widths[0] != widths[1]:
        raise ValueError(
            f"student hidden {student_hidden.shape} needs a projection {widths} to the teacher's "
            "width"
        )
    if projection is not None and projection.shape != widths:
        raise ValueError(f"projection {projection.shape} must be {widths}")
    if where is not None and where.shape != leading:
        raise ValueError(f"where {where.shape} does not fit student hidden {student_hidden.shape}")
    student = jnp.asarray(student_hidden, jnp.float32)
    teacher = jax.lax.stop_gradient(jnp.asarray(teacher_hidden, jnp.float32))
    if where is not None:
        # Before the product: the projection's gradient sums over tokens, and 0 * NaN is NaN.
        counts = (where != 0)[..., None]
        student, teacher = (
            jnp.where(counts, student, 0.0),
            jnp.where(counts, teacher, 0.0),
        )
    if projection is not None:
        student = student @ jnp.asarray(projection, jnp.float32)
    return student, teacher


def _direction(vector: jax.Array) -> jax.Array:
    """The unit vector, or zeros without a gradient where there is no direction."""
    square = jnp.sum(jnp.square(vector), axis=-1, keepdims=True)
    has_direction = square > _SHORTEST**2
    length = jnp.sqrt(jnp.where(has_direction, square, 1.0))
    return jnp.where(has_direction, vector, 0.0) / length
