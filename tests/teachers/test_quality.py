"""The measure of the schemes' quality, held against gradients of the losses themselves."""

import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from distill_jax import losses, teachers

FOLDER = pathlib.Path(__file__).parents[2] / "scripts" / "targets"
VOCAB = 600


@pytest.fixture(scope="module")
def quality():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("quality")


def batches(quality, count, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        teacher = 3 * rng.standard_normal((quality.BATCH, VOCAB))
        student = teacher + rng.standard_normal(teacher.shape)
        yield jnp.asarray(teacher, jnp.float32), jnp.asarray(student, jnp.float32)


@pytest.mark.parametrize(
    ("scheme", "renormalised"),
    [
        (teachers.TopK(k=7), False),
        (teachers.TopK(k=7), True),
        (teachers.RandomSampling(draws=20), False),
        (teachers.Threshold(tau=0.06), False),
    ],
)
def test_errors_are_those_of_the_gradients(quality, scheme, renormalised):
    ((teacher, student),) = batches(quality, 1)
    keys = jax.vmap(jax.random.key)(jnp.arange(len(teacher)))
    entry = quality.Entry("", scheme, renormalised)
    targets = entry.targets(quality._encode(scheme, teacher, keys))
    error, gradient, total = quality.errors(targets, quality.dense(teacher, student))

    loss = lambda logits: losses.forward_kl(logits, targets).sum()  # noqa: E731
    p, q = (scipy.special.softmax(np.asarray(x, np.float64), -1) for x in (teacher, student))
    found = np.asarray(jax.grad(loss)(student), np.float64) - (q - p)
    np.testing.assert_allclose(gradient, np.square(found).sum(-1), rtol=2e-3, atol=1e-8)
    if isinstance(targets, losses.SampledTargets):
        weights = np.zeros_like(p)
        for row, (ids, values) in enumerate(zip(targets.ids, targets.weights)):
            np.add.at(weights[row], ids, values)
        found = p - weights
    np.testing.assert_allclose(error, np.square(found).sum(-1), rtol=2e-3, atol=1e-8)
    np.testing.assert_allclose(total, -found.sum(0), rtol=1e-3, atol=1e-5)


def test_schemes_are_set_up_for_the_ids_that_are_asked(quality):
    calibration = quality.Calibration.of(batches(quality, 2))
    logits = np.concatenate([teacher for teacher, _ in batches(quality, 2)])
    found = calibration.threshold(quality.Cost(0, 1, 1), 9.0)
    assert found.tau == pytest.approx(float(teachers.threshold_for(logits, 9.0)), rel=1e-4)
    draws = calibration.random(quality.Cost(0, 1, 1), 9.0).draws
    probs = scipy.special.softmax(logits.astype(np.float64), axis=-1)
    ids = [(1 - (1 - probs) ** n).sum(-1).mean() for n in (draws - 1, draws + 1)]
    assert ids[0] < 9 < ids[1]


def test_a_measurement_as_a_whole(quality, monkeypatch):
    source = lambda tokens, seed, calibration: (batches(quality, 2), batches(quality, 2, 5))  # noqa: E731
    monkeypatch.setattr(quality, "synthetic", source)
    figures = quality.measure(quick=True, on=("synthetic",))
    one = figures["synthetic"]
    rows = {row["label"].split()[0]: row for row in one["rows"] if "alone" not in row["label"]}
    for name in ("top_k", "random_sampling", "threshold"):
        assert rows[name]["ids"] == pytest.approx(10, rel=0.05)
    ratio = rows["threshold"]["error"] / rows["random_sampling"]["error"]
    assert figures["mse_threshold_over_random"] == pytest.approx(ratio)
    assert 0.1 < ratio < 0.8
    assert 0.3 < figures["bias_z_max"] < 4


def test_a_bias_of_a_hundredth_is_seen(quality, monkeypatch):
    unpack = teachers.Threshold.unpack

    def biased(self, arrays):
        made = unpack(self, arrays)
        return made | {"weights": made["weights"] * np.float32(1.01)}

    monkeypatch.setattr(teachers.Threshold, "unpack", biased)
    ((teacher, student),) = batches(quality, 1)
    entry = quality.Entry("", teachers.Threshold(tau=0.05))
    assert max(quality._bias([entry], (teacher, student), 16, 0).values()) > 6
