import chex
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from distill_jax import losses
from distill_jax.losses import features

N, STUDENT, TEACHER = 6, 4, 5

LOSSES = {
    "mse": features.hidden_mse,
    "relative mse": lambda *args, **kwargs: features.hidden_mse(*args, relative=True, **kwargs),
    "cosine": features.hidden_cosine,
}


def definition(name, student, teacher, projection):
    """In float64, token by token."""
    values = []
    for s, t in zip(np.asarray(student, np.float64), np.asarray(teacher, np.float64), strict=True):
        s = s @ np.asarray(projection, np.float64)
        if name == "cosine":
            values.append(1 - s @ t / np.linalg.norm(s) / np.linalg.norm(t))
        else:
            values.append(np.mean((s - t) ** 2) / (np.mean(t**2) if name != "mse" else 1.0))
    return values


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    shapes = ((N, STUDENT), (N, TEACHER), (STUDENT, TEACHER))
    return [jnp.asarray(3 * rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("name", LOSSES)
def test_equals_definition(name, arrays):
    student, teacher, projection = arrays
    value = LOSSES[name](student, teacher, projection)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, definition(name, *arrays), rtol=1e-5, atol=1e-6)
    by_row = LOSSES[name](student.reshape(2, 3, -1), teacher.reshape(2, 3, -1), projection)
    np.testing.assert_allclose(by_row, value.reshape(2, 3), rtol=1e-5)
    np.testing.assert_allclose(
        LOSSES[name](student, teacher[:, :STUDENT]),
        definition(name, student, teacher[:, :STUDENT], np.eye(STUDENT)),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("name", LOSSES)
def test_numerical_gradients_of_student_and_projection(name, arrays):
    student, teacher, projection = arrays
    jax.test_util.check_grads(
        lambda student, projection: LOSSES[name](student, teacher, projection),
        (student, projection),
        order=1,
        modes=("rev",),
        atol=2e-2,
        rtol=2e-2,
    )


@pytest.mark.parametrize("name", LOSSES)
def test_teacher_gets_no_gradient(name, arrays):
    slope = jax.grad(lambda teacher: LOSSES[name](arrays[0], teacher, arrays[2]).sum())(arrays[1])
    np.testing.assert_array_equal(slope, 0.0)


def test_perfect_and_opposite(arrays):
    _, teacher, _ = arrays
    for name, scaled, expected in (
        ("mse", teacher, 0.0),
        ("relative mse", 0.0 * teacher, 1.0),
        ("relative mse", 2.0 * teacher, 1.0),
        ("cosine", 1e4 * teacher, 0.0),
        ("cosine", -1e-4 * teacher, 2.0),
    ):
        np.testing.assert_allclose(LOSSES[name](scaled, teacher), expected, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("zero", ["student", "teacher", "projection", "both"])
def test_zeros_are_finite(name, zero, arrays):
    student, teacher, projection = (
        array * (zero not in kinds)
        for array, kinds in zip(
            arrays, (("student", "both"), ("teacher", "both"), ("projection",)), strict=True
        )
    )

    def loss(student, projection):
        return LOSSES[name](student, teacher, projection).sum()

    value, slopes = jax.value_and_grad(loss, argnums=(0, 1))(student, projection)
    chex.assert_tree_all_finite((value, slopes))
    if name == "cosine":
        np.testing.assert_allclose(value, N)
        if zero != "teacher":
            chex.assert_trees_all_equal(slopes, jax.tree.map(jnp.zeros_like, slopes))


@pytest.mark.parametrize("name", LOSSES)
def test_masked_tokens_may_hold_anything(name, arrays):
    student, teacher, projection = arrays
    where = jnp.asarray([1.0, 0.0, 0.5, 0.0, 1.0, 1.0])
    left_out = (where == 0)[:, None]

    def mean(student, projection, teacher, where):
        loss_N = LOSSES[name](student, teacher, projection, where=where)
        return losses.reduce(loss_N, {}, where).mean()[0], loss_N

    grad = jax.value_and_grad(mean, argnums=(0, 1), has_aux=True)
    spoilt = jnp.where(left_out, jnp.nan, student), jnp.where(left_out, jnp.inf, teacher)
    (value, loss_N), (student_bar, projection_bar) = grad(spoilt[0], projection, spoilt[1], where)
    np.testing.assert_array_equal(loss_N[where == 0], 0.0)
    np.testing.assert_array_equal(student_bar[where == 0], 0.0)
    kept = np.flatnonzero(where)
    (expected, _), bars = grad(student[kept], projection, teacher[kept], where[kept])
    chex.assert_trees_all_close(
        (value, student_bar[kept], projection_bar), (expected, *bars), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_is_computed_in_float32(name, arrays):
    half = [array.astype(jnp.bfloat16) for array in arrays]
    whole = [array.astype(jnp.float32) for array in half]
    value = LOSSES[name](*half)
    assert value.dtype == jnp.float32
    chex.assert_trees_all_close(value, LOSSES[name](*whole), rtol=1e-6)


def test_what_does_not_fit_is_refused(arrays):
    student, teacher, projection = arrays
    with pytest.raises(ValueError, match="not of the same tokens"):
        features.hidden_mse(student[1:], teacher, projection)
    with pytest.raises(ValueError, match=r"needs a projection \(4, 5\)"):
        features.hidden_cosine(student, teacher)
    with pytest.raises(ValueError, match=r"projection \(5, 4\) must be \(4, 5\)"):
        features.hidden_mse(student, teacher, projection.T)
    with pytest.raises(ValueError, match=r"where \(6, 1\) does not fit"):
        features.hidden_mse(student, teacher, projection, where=jnp.ones((N, 1)))
