"""Losses with one mistake each: the property that names the mistake must fail."""

import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import losses, testing

pytestmark = pytest.mark.slow

stop = jax.lax.stop_gradient


def only(*names):
    """What to skip so that these alone are tried; the shape always is."""
    return testing.PROPERTIES.keys() - {"shape", *names}


def failures(check, function, *names, **options):
    """Those of some properties that fail."""
    with pytest.raises(testing.PropertyError) as caught:
        check(function, skip=only(*names), **options)
    assert all(f"{name} (" in str(caught.value) for name in caught.value.report.failed)
    return caught.value.report.failed


def of_divergence(function, *names, kinds=("dense",), **options):
    return failures(testing.check_divergence, function, *names, kinds=kinds, **options)


def of_objective(function, *names, **options):
    return failures(testing.check_objective, function, *names, **options)


def sides(student, teacher, temperature):
    teacher = jax.nn.log_softmax(stop(teacher).astype(jnp.float32) / temperature)
    return teacher, jax.nn.log_softmax(student.astype(jnp.float32) / temperature)


def kl(log_p, log_q):
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def right(student, teacher, *, temperature=1.0):
    return temperature**2 * kl(*sides(student, teacher, temperature))


def forward_reference(p, q):
    return np.sum(p * np.log(p / q))


def picked(student, labels):
    logits = jax.nn.log_softmax(student.astype(jnp.float32))
    return -jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]


def test_nothing_fails_without_a_mistake():
    report = testing.check_divergence(
        right,
        kinds=("dense",),
        reference=forward_reference,
        skip=("-inf in student", "-inf in teacher", "-inf in both", "padded vocabulary", "jit"),
    )
    assert len(report.passed) > 15
    assert not report.failed


@pytest.mark.parametrize("power", [0, 1, 3])
def test_wrong_power_of_temperature(power):
    def wrong(student, teacher, *, temperature=1.0):
        return temperature**power * kl(*sides(student, teacher, temperature))

    assert of_divergence(wrong, "temperature", "zero") == ("temperature",)


def test_temperature_on_one_side_only():
    def wrong(student, teacher, *, temperature=1.0):
        log_p, _ = sides(student, teacher, temperature)
        _, log_q = sides(student, teacher, 1.0)
        return temperature**2 * kl(log_p, log_q)

    assert of_divergence(wrong, "temperature") == ("temperature",)
    assert "zero gradient" in of_divergence(wrong, "zero", "zero gradient")


def test_temperature_squared_on_one_part_only():
    def wrong(student, teacher, *, temperature=1.0):
        log_p, log_q = sides(student, teacher, temperature)
        return temperature**2 * kl(log_p, log_q) + kl(log_q, log_p)

    assert of_divergence(wrong, "temperature", "zero") == ("temperature",)


def test_student_and_teacher_swapped():
    def wrong(student, teacher, *, temperature=1.0):
        log_p, log_q = sides(student, teacher, temperature)
        return temperature**2 * kl(log_q, log_p)

    names = "reference", "zero", "zero gradient", "never negative", "temperature"
    assert of_divergence(wrong, *names, reference=forward_reference) == ("reference",)


def test_double_softmax():
    def wrong(student, teacher, *, temperature=1.0):
        probabilities = (jax.nn.softmax(side / temperature) for side in (student, teacher))
        return temperature**2 * kl(*sides(*probabilities, 1.0))

    names = "padded vocabulary", "zero", "zero gradient", "temperature", "numerical gradient"
    assert of_divergence(wrong, *names) == ("padded vocabulary",)
    assert of_divergence(wrong, "reference", reference=forward_reference) == ("reference",)


def top_k_sides(student, teacher, temperature):
    log_q = jax.nn.log_softmax(student / temperature)
    return stop(teacher.log_probs), jnp.take_along_axis(log_q, teacher.ids, axis=-1)


def test_renormalised_top_k():
    def wrong(student, teacher, *, temperature=1.0):
        if not isinstance(teacher, losses.TopKTargets):
            return right(student, teacher, temperature=temperature)
        log_p, log_q = top_k_sides(student, teacher, temperature)
        return temperature**2 * kl(jax.nn.log_softmax(log_p), jax.nn.log_softmax(log_q))

    names = "top-k bucket", "K = V", "zero", "zero gradient", "never negative", "temperature"
    assert of_divergence(wrong, *names, kinds=("dense", "top_k")) == ("top-k bucket",)


def test_forgotten_tail():
    def wrong(student, teacher, *, temperature=1.0):
        if not isinstance(teacher, losses.TopKTargets):
            return right(student, teacher, temperature=temperature)
        return temperature**2 * kl(*top_k_sides(student, teacher, temperature))

    found = of_divergence(
        wrong, "top-k bucket", "never negative", "K = V", kinds=("dense", "top_k")
    )
    assert found == ("never negative", "top-k bucket")


def test_teacher_without_stop_gradient():
    def wrong(student, teacher, *, temperature=1.0):
        log_p, log_q = (jax.nn.log_softmax(side / temperature) for side in (teacher, student))
        return temperature**2 * kl(log_p, log_q)

    assert of_divergence(wrong, "teacher gradient", "numerical gradient") == ("teacher gradient",)


def test_stop_gradient_on_a_part_of_the_student():
    def wrong(student, teacher, *, temperature=1.0):
        log_p, log_q = sides(student, teacher, temperature)
        return temperature**2 * jnp.sum(stop(jnp.exp(log_q)) * (log_q - log_p), axis=-1)

    names = "numerical gradient", "zero gradient", "teacher gradient"
    assert of_divergence(wrong, "zero", *names) == ("numerical gradient",)


def test_nan_where_nothing_times_infinity():
    names = "-inf in student", "-inf in teacher", "-inf in both", "large logits"
    assert set(of_divergence(right, *names)) == {*names} - {"large logits"}


def test_infinity_where_a_probability_vanishes():
    def wrong(student, teacher, *, temperature=1.0):
        p, q = (jax.nn.softmax(side / temperature) for side in (stop(teacher), student))
        return temperature**2 * jnp.sum(p * jnp.log(p / q), axis=-1)

    assert of_divergence(wrong, "large logits", "zero") == ("large logits",)


def test_gradient_alone_not_finite():
    """The classic `where` that hides the value of a branch, not its gradient."""

    def wrong(student, teacher, *, temperature=1.0):
        log_p, log_q = sides(student, teacher, temperature)
        q = jnp.exp(log_q)
        ratio = jnp.where(q > 0, jnp.log(q) - jnp.maximum(log_p, -1e5), 0.0)
        return temperature**2 * jnp.sum(q * ratio, axis=-1)

    assert of_divergence(wrong, "large logits", "zero") == ("large logits",)


def test_constant_and_sign():
    assert of_divergence(lambda *a, **k: right(*a, **k) + 0.1, "zero", "never negative") == (
        "zero",
    )
    assert of_divergence(lambda *a, **k: -right(*a, **k), "zero", "never negative") == (
        "never negative",
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sums_in_low_precision(dtype):
    def wrong(student, teacher, *, temperature=1.0):
        log_p, log_q = (
            jax.nn.log_softmax(side.astype(dtype) / temperature)
            if student.dtype == dtype
            else jax.nn.log_softmax(side / temperature)
            for side in (stop(teacher), student)
        )
        return (temperature**2 * kl(log_p, log_q)).astype(jnp.float32)

    assert of_divergence(wrong, "low precision", "dtype") == ("low precision",)


def test_loss_in_the_dtype_of_the_logits():
    def wrong(student, teacher, *, temperature=1.0):
        return right(student, teacher, temperature=temperature).astype(student.dtype)

    assert "dtype" in of_divergence(wrong, "low precision", "dtype")


def test_mean_inside_the_objective():
    def wrong(logits_NV, targets, *, step=None):
        return jnp.mean(picked(logits_NV, targets["labels"])), {}

    assert of_objective(wrong, *testing.PROPERTIES) == ("shape",)


def test_mean_over_padding():
    """Divided by all tokens, padding included, instead of by those that count."""

    def wrong(logits_NV, targets, *, step=None):
        return picked(logits_NV, targets["labels"]) / len(logits_NV), {}

    found = of_objective(wrong, "mask equals subset", "sharding", "fused head", "token order")
    assert found == ("mask equals subset", "sharding", "fused head")


def test_tokens_that_look_at_one_another():
    def wrong(logits_NV, targets, *, step=None):
        loss_N = picked(logits_NV, targets["labels"])
        return loss_N - jnp.mean(loss_N), {}

    names = "mask equals subset", "independent tokens", "masked tokens"
    assert set(of_objective(wrong, *names)) == {*names}


def test_missing_mask():
    """One NaN in the padding reaches every token."""

    def wrong(logits_NV, targets, *, step=None):
        loss_N = picked(logits_NV, targets["labels"])
        return loss_N + 0.0 * jnp.sum(loss_N), {}

    assert of_objective(wrong, "masked tokens", "token order") == ("masked tokens",)


def test_labels_off_by_one_token():
    def wrong(logits_NV, targets, *, step=None):
        return picked(logits_NV, jnp.roll(targets["labels"], -1)), {}

    assert "independent tokens" in of_objective(wrong, "independent tokens", "vocabulary order")


def test_labels_off_by_one_entry():
    def wrong(logits_NV, targets, *, step=None):
        return picked(logits_NV, (targets["labels"] + 1) % logits_NV.shape[1]), {}

    def reference(logits_V, targets):
        return np.log(np.exp(logits_V).sum()) - logits_V[targets["labels"]]

    assert of_objective(wrong, "vocabulary order", "token order") == ("vocabulary order",)
    assert of_objective(wrong, "reference", reference=reference) == ("reference",)


def test_order_of_tokens():
    def wrong(logits_NV, targets, *, step=None):
        return picked(logits_NV, targets["labels"]) * jnp.arange(1, len(logits_NV) + 1), {}

    assert of_objective(wrong, "token order", "independent tokens") == ("token order",)


def test_logits_compared_as_they_are():
    def wrong(logits_NV, targets, *, step=None):
        return jnp.mean(jnp.square(logits_NV - stop(targets["8b"])), axis=-1), {}

    found = of_objective(wrong, "constant shift", teachers=("8b",), kinds=("dense",))
    assert found == ("constant shift",)


def test_biased_samples():
    def wrong(student, teacher, *, temperature=1.0):
        if not isinstance(teacher, losses.SampledTargets):
            return right(student, teacher, temperature=temperature)
        log_q = jax.nn.log_softmax(student / temperature)
        drawn = jnp.take_along_axis(log_q, teacher.ids, axis=-1)
        return -(temperature**2) * jnp.mean(drawn * jnp.exp(stop(drawn)), axis=-1)

    found = of_divergence(wrong, "unbiased samples", kinds=("dense", "sampled"))
    assert found == ("unbiased samples",)


def test_python_branch_on_a_value():
    def wrong(logits_NV, targets, *, step=None):
        loss_N = picked(logits_NV, targets["labels"])
        return (loss_N if loss_N.sum() > 0 else -loss_N), {}

    with pytest.raises(testing.PropertyError, match=r"jit \(labels\): it can be compiled"):
        testing.check_objective(wrong)


def test_another_result_when_compiled():
    def wrong(logits_NV, targets, *, step=None):
        eager = not isinstance(logits_NV, jax.core.Tracer)
        return picked(logits_NV, targets["labels"]) + eager, {}

    assert of_objective(wrong, "jit", "token order") == ("jit",)


def test_what_cannot_be_mapped():
    def wrong(logits_NV, targets, *, step=None):
        loss_N = picked(logits_NV, targets["labels"])
        like = jax.ShapeDtypeStruct(loss_N.shape, loss_N.dtype)
        spread = jax.pure_callback(lambda x: np.ptp(np.asarray(x), -1), like, stop(logits_NV))
        return loss_N + stop(spread), {}

    assert of_objective(wrong, "vmap", "token order") == ("vmap",)


def test_size_that_depends_on_k():
    def wrong(student, teacher, *, temperature=1.0):
        value = losses.forward_kl(student, teacher, temperature=temperature)
        return value / teacher.ids.shape[-1] if isinstance(teacher, losses.TopKTargets) else value

    found = of_divergence(wrong, "K = V", "zero", kinds=("dense", "top_k"))
    assert found == ("K = V",)


def test_another_result_every_time():
    calls = itertools.count(random.Random(0).randint(1, 9))

    def wrong(logits_NV, targets, *, step=None):
        def noise(_):
            return np.float32(next(calls))

        noise_N = jax.pure_callback(noise, jax.ShapeDtypeStruct((), jnp.float32), step)
        return picked(logits_NV, targets["labels"]) + noise_N, {}

    assert "token order" in of_objective(wrong, "token order")
