import itertools

import chex
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from distill_jax import losses

from . import oracles

V = 13
NAMES = sorted(oracles.DIVERGENCES)


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 6, V)) * 2
    return jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32)


def value_and_gradient(function, student, teacher, **kwargs):
    @jax.jit
    def both(student, teacher):
        value, pullback = jax.vjp(lambda student: function(student, teacher, **kwargs), student)
        return value, pullback(jnp.ones_like(value))[0]

    return both(student, teacher)


def gradient(function, student, teacher, **kwargs):
    return value_and_gradient(function, student, teacher, **kwargs)[1]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", NAMES)
def test_dense_equals_definition(name, temperature, logits):
    student, teacher = logits
    expected = temperature**2 * oracles.divergence(
        name, oracles.softmax(teacher, temperature), oracles.softmax(student, temperature)
    )
    value = oracles.loss(name)(student, teacher, temperature=temperature)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", NAMES)
def test_top_k_equals_definition_over_ids_and_bucket(name, temperature, logits):
    student, teacher = logits
    targets, ids = oracles.top_k(teacher, 4, temperature)
    p = oracles.bucketed(oracles.softmax(teacher, temperature), ids)
    q = oracles.bucketed(oracles.softmax(student, temperature), ids)
    value = oracles.loss(name)(student, targets, temperature=temperature)
    if name == "adaptive_kl":  # the bucket never is in the head
        p_dense = oracles.adaptive_kl(p[..., :-1], q[..., :-1], 0.5)
        assert value.shape == p_dense.shape
        weight = _head_share(p, q)
        expected = weight * oracles.kl(p, q) + (1 - weight) * oracles.kl(q, p)
    else:
        expected = oracles.divergence(name, p, q)
    np.testing.assert_allclose(value, temperature**2 * expected, rtol=2e-5, atol=2e-6)


def _head_share(p, q):
    before = np.cumsum(p, -1) - p  # ids come in falling order of probability
    head = before < 0.5
    head[..., -1] = False
    gap = np.abs(p - q)
    return (gap * head).sum(-1) / gap.sum(-1)


@pytest.mark.parametrize("name", NAMES)
def test_top_k_of_everything_equals_dense(name, logits):
    student, teacher = logits
    targets, _ = oracles.top_k(teacher, V)
    function = oracles.loss(name)
    chex.assert_trees_all_close(
        value_and_gradient(function, student, targets),
        value_and_gradient(function, student, teacher),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in NAMES if name not in ("alpha_beta_divergence", "adaptive_kl")]
)
def test_top_k_is_a_lower_bound_that_rises_with_k(name, logits):
    student, teacher = logits
    values = [oracles.loss(name)(student, oracles.top_k(teacher, k)[0]) for k in (1, 4, V)]
    for lower, higher in itertools.pairwise(values):
        assert bool(jnp.all(lower <= higher + 1e-5))
    assert bool(jnp.all(values[0] < values[-1]))


@pytest.mark.slow
def test_students_tail_is_exact_where_it_is_tiny():
    student = jnp.asarray([[0.0, -30.0, -31.0]])
    targets = losses.TopKTargets(
        jnp.asarray([[0]]), jnp.log(jnp.asarray([[0.5]])), jnp.log(jnp.asarray([0.5]))
    )
    expected = 0.5 * np.log(0.5) * 2 - 0.5 * (-30 + np.log1p(np.exp(-1)))
    np.testing.assert_allclose(losses.forward_kl(student, targets), [expected], rtol=1e-5)
    q = oracles.softmax(student)
    tail = 0.5 * q[0, 1:] / q[0, 1:].sum()
    np.testing.assert_allclose(
        gradient(losses.forward_kl, student, targets)[0], [0.5, *-tail], rtol=1e-5
    )


@pytest.mark.parametrize("name", NAMES)
def test_zero_at_student_equal_to_teacher(name, logits):
    _, teacher = logits
    function = oracles.loss(name)
    for targets in (teacher, oracles.top_k(teacher, 4)[0]):
        value, slope = value_and_gradient(function, teacher, targets)
        np.testing.assert_allclose(value, 0.0, atol=3e-6)
        if name != "total_variation" or targets is teacher:  # a kink, where rounding has its way
            np.testing.assert_allclose(slope, 0.0, atol=3e-6)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "adaptive_kl"])
def test_numerical_gradients(name, logits):
    student, teacher = logits
    targets, _ = oracles.top_k(teacher, 4)
    function = oracles.loss(name)
    for kind in (teacher, targets):
        jax.test_util.check_grads(
            lambda student, kind=kind: function(student, kind),
            (student,),
            order=1,
            modes=("rev",),
            atol=2e-2,
            rtol=2e-2,
        )


def test_numerical_gradients_of_every_sparse_kind(logits):
    student, teacher = logits
    targets = oracles.sampled(teacher, 6, np.random.default_rng(4))
    chex.assert_numerical_grads(
        lambda student: losses.forward_kl(student, teacher),
        (student,),
        1,
        atol=1e-3,
        modes=("rev",),
    )
    jax.test_util.check_grads(
        lambda student: losses.forward_kl(student, targets),
        (student,),
        order=1,
        modes=("rev",),
        atol=2e-2,
        rtol=2e-2,
    )


def test_the_bucket_stays_in_the_tail_even_where_the_head_is_not_full(logits):
    student, teacher = logits
    targets, ids = oracles.top_k(teacher / 8, 2)  # two of thirteen: far from half of the mass
    p = oracles.bucketed(oracles.softmax(teacher / 8), ids)
    q = oracles.bucketed(oracles.softmax(student), ids)
    assert np.all(p[:, :2].sum(-1) < 0.5)
    gap = np.abs(p - q)
    weight = gap[:, :2].sum(-1) / gap.sum(-1)
    expected = weight * oracles.kl(p, q) + (1 - weight) * oracles.kl(q, p)
    np.testing.assert_allclose(losses.adaptive_kl(student, targets), expected, rtol=1e-5)


def test_adaptive_gradient_mixes_those_of_both_kls(logits):
    student, teacher = logits
    p, q = oracles.softmax(teacher), oracles.softmax(student)
    forward, reverse = oracles.kl(p, q), oracles.kl(q, p)
    weight = ((oracles.adaptive_kl(p, q, 0.5) - reverse) / (forward - reverse))[..., None]
    expected = weight * (q - p) + (1 - weight) * q * (np.log(q / p) - reverse[..., None])
    actual = gradient(losses.adaptive_kl, student, teacher)
    np.testing.assert_allclose(actual, expected, atol=2e-5)


def _extremes():
    spread = jnp.asarray([[1e4, -1e4, 0.0, 5.0], [-1e4, 1e4, 3.0, 0.0]])
    ruled_out = jnp.asarray([[0.0, -jnp.inf, 1.0, 2.0], [-jnp.inf, -jnp.inf, 1.0, -jnp.inf]])
    lowest = ruled_out.at[ruled_out == -jnp.inf].set(jnp.finfo(jnp.float32).min)
    mild = jnp.asarray([[0.1, 0.2, -0.3, 0.4], [1.0, 0.0, -1.0, 2.0]])
    return {
        "spread student": (spread, mild),
        "spread teacher": (mild, spread),
        "opposite": (spread, -spread),
        "teacher rules out": (mild, ruled_out),
        "teacher at the lowest float": (mild, lowest),
        "both rule out": (ruled_out, ruled_out),
        "student rules out": (ruled_out, mild),
    }


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 1e-3])
@pytest.mark.parametrize("name", NAMES)
def test_extremes_are_finite(name, temperature):
    function = oracles.loss(name)
    student, teacher = (jnp.concatenate(side) for side in zip(*_extremes().values(), strict=True))
    kinds = [teacher]
    if temperature == 1.0:
        kinds += [oracles.top_k(teacher, k)[0] for k in (2, 4)]
    for kind in kinds:
        value, slope = value_and_gradient(function, student, kind, temperature=temperature)
        assert bool(jnp.all(jnp.isfinite(value))), value
        assert bool(jnp.all(jnp.isfinite(slope))), slope
        assert bool(jnp.all(value >= -1e-5)), value


def test_kls_of_large_finite_logits_are_exact():
    student, teacher = _extremes()["opposite"]
    for name in ("forward_kl", "reverse_kl"):
        np.testing.assert_allclose(oracles.loss(name)(student, teacher), [2e4, 2e4], rtol=1e-6)
    student, teacher = _extremes()["spread student"]
    np.testing.assert_allclose(
        gradient(losses.forward_kl, student, teacher),
        oracles.softmax(student) - oracles.softmax(teacher),
        atol=1e-6,
    )


@pytest.mark.parametrize("name", NAMES)
def test_outcomes_ruled_out_by_both_cost_nothing(name, logits):
    student, teacher = logits
    pad = ((0, 0), (0, 3))
    wide = [jnp.pad(side, pad, constant_values=-jnp.inf) for side in (student, teacher)]
    function = oracles.loss(name)
    value, slope = value_and_gradient(function, *wide)
    chex.assert_trees_all_close(
        (value, slope[..., :V]),
        value_and_gradient(function, student, teacher),
        atol=1e-5,
    )


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_computed_in_float32(name, logits):
    half = [side.astype(jnp.bfloat16) for side in logits]
    whole = [side.astype(jnp.float32) for side in half]
    function = oracles.loss(name)
    assert function(*half).dtype == jnp.float32
    chex.assert_trees_all_close(function(*half), function(*whole), rtol=1e-6)
    slope = gradient(function, *half)
    assert slope.dtype == jnp.bfloat16
    chex.assert_trees_all_close(
        slope.astype(jnp.float32), gradient(function, *whole), rtol=1e-2, atol=1e-6
    )


@pytest.mark.parametrize("name", NAMES)
def test_teacher_gets_no_gradient(name, logits):
    student, teacher = logits
    targets, _ = oracles.top_k(teacher, 4)
    function = oracles.loss(name)
    dense = jax.grad(lambda teacher: function(student, teacher).sum())(teacher)
    sparse = jax.grad(lambda targets: function(student, targets).sum(), allow_int=True)(targets)
    np.testing.assert_array_equal(dense, 0.0)
    np.testing.assert_array_equal(sparse.log_probs, 0.0)
    np.testing.assert_array_equal(sparse.log_tail, 0.0)


def test_forward_kl_is_linear_in_the_teacher(logits):
    student, first = logits
    second = first[::-1]
    mixture = jnp.log(0.3 * jax.nn.softmax(first) + 0.7 * jax.nn.softmax(second))
    summed = 0.3 * gradient(losses.forward_kl, student, first) + 0.7 * gradient(
        losses.forward_kl, student, second
    )
    chex.assert_trees_all_close(gradient(losses.forward_kl, student, mixture), summed, atol=1e-6)


def test_limits(logits):
    student, teacher = logits
    forward, reverse = losses.forward_kl(student, teacher), losses.reverse_kl(student, teacher)
    small = 1e-4

    def close(value, limit):
        np.testing.assert_allclose(value, limit, rtol=2e-2)

    close(losses.jensen_shannon(student, teacher, beta=small) / small, forward)
    close(losses.jensen_shannon(student, teacher, beta=1 - small) / small, reverse)
    close(losses.alpha_beta_divergence(student, teacher, alpha=1.0, beta=small), forward)
    close(losses.alpha_beta_divergence(student, teacher, alpha=small, beta=1.0), reverse)
    close(losses.skewed_forward_kl(student, teacher, alpha=1e-5), forward)
    close(losses.skewed_reverse_kl(student, teacher, alpha=1e-5), reverse)


def test_interpolated_logits(logits):
    student, teacher = logits
    mixed = losses.interpolate_logits(student, teacher, 0.25)
    np.testing.assert_allclose(mixed, 0.75 * student + 0.25 * teacher, rtol=1e-6, atol=1e-6)
    infinite = teacher.at[..., 0].set(-jnp.inf)
    chex.assert_trees_all_equal(losses.interpolate_logits(student, infinite, 0.0), student)
    chex.assert_trees_all_equal(losses.interpolate_logits(infinite, student, 1.0), student)
    slopes = jax.grad(lambda *sides: losses.interpolate_logits(*sides, 0.5).sum(), argnums=(0, 1))(
        student, teacher
    )
    chex.assert_trees_all_equal(slopes, jax.tree.map(jnp.zeros_like, slopes))
    with pytest.raises(ValueError, match="differ"):
        losses.interpolate_logits(student, teacher[..., 1:], 0.5)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "forward_kl"])
def test_sampled_targets_are_refused_by_all_but_forward_kl(name, logits):
    student, teacher = logits
    targets = oracles.sampled(teacher, 4, np.random.default_rng(5))
    with pytest.raises(TypeError, match=f"{name}.*forward_kl, or store TopKTargets or logits"):
        oracles.loss(name)(student, targets)


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_is_refused(name, logits):
    student, teacher = logits
    function = oracles.loss(name)
    targets, _ = oracles.top_k(teacher, 4, 2.0)
    with pytest.raises(ValueError, match=r"stored at temperature 2\.0 .* loss at temperature 1\.0"):
        function(student, targets)
    with pytest.raises(ValueError, match="do not fit"):
        function(student, teacher[..., 1:])
    with pytest.raises(ValueError, match="do not fit"):
        function(student[1:], targets, temperature=2.0)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        function(student, teacher, temperature=0.0)
    with pytest.raises(TypeError, match="got dict"):
        function(student, {"logits": teacher})


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("jensen_shannon", "beta", 1.0),
        ("skewed_forward_kl", "alpha", 0.0),
        ("skewed_reverse_kl", "alpha", 1.5),
        ("adaptive_kl", "head_mass", 0.0),
        ("alpha_beta_divergence", "beta", 0.0),
    ],
)
def test_parameters_out_of_range_are_refused(name, field, value, logits):
    with pytest.raises(ValueError, match=f"{field}.* must be"):
        oracles.loss(name, **{field: value})(*logits)
