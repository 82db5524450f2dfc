"""The measure of the schemes' quality, held against gradients of the losses themselves."""

import importlib
import pathlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from distill_jax import artifacts, losses, teachers
from distill_jax.teachers import order
from distill_jax.teachers.codec import Codec

FOLDER = pathlib.Path(__file__).parents[2] / "scripts" / "targets"
MODULES = ("quality", "measured", "errors", "calibration", "bias", "distributions", "picture")
VOCAB = 600


@pytest.fixture(scope="module")
def measure():
    """The scripts' modules, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})


class Source:
    """A teacher of 600 ids, some more frequent than others."""

    token_counts = np.arange(VOCAB)[::-1] + 1

    def __init__(self, seed=0):
        self.seed = seed

    def batches(self, split, start, tokens):
        for index in range(start // 128, (start + tokens) // 128):
            rng = np.random.default_rng((self.seed, split == "train", index))
            teacher = 3 * rng.standard_normal((128, VOCAB))
            student = teacher + rng.standard_normal(teacher.shape)
            logits = (jnp.asarray(x, jnp.float32) for x in (teacher, student))
            yield Batch(*logits, rng.integers(0, VOCAB, 128))


class Batch(SimpleNamespace):
    def __init__(self, teacher, student, labels):
        super().__init__(teacher_NV=teacher, student_NV=student, labels_N=labels)
        self.all = (teacher, student, labels)

    def __iter__(self):
        return iter(self.all)


def one_batch():
    return next(Source().batches("held_out", 0, 128))


def keys(count):
    return jax.vmap(jax.random.key)(jnp.arange(count))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "alone"),
    [
        (teachers.TopK(k=7), False),
        (teachers.TopK(k=7), True),
        (teachers.RandomSampling(draws=20), False),
        (teachers.Threshold(tau=0.06), False),
    ],
)
def test_errors_are_those_of_the_gradients(measure, scheme, alone):
    teacher, student, labels = one_batch()
    entry = measure.errors.Entry("", scheme, alone)
    (arrays,) = measure.calibration.encode((scheme,), teacher, labels, keys(128))
    targets = entry.targets(arrays)
    error, gradient, total = measure.errors.errors(targets, measure.errors.dense(teacher, student))

    loss = lambda logits: losses.forward_kl(logits, targets).sum()  # noqa: E731
    p, q = (scipy.special.softmax(np.asarray(x, np.float64), -1) for x in (teacher, student))
    found = np.asarray(jax.grad(loss)(student), np.float64) - (q - p)
    np.testing.assert_allclose(gradient, np.square(found).sum(-1), rtol=2e-3, atol=1e-7)
    if isinstance(targets, losses.SampledTargets):
        weights = np.zeros_like(p)
        for row, (ids, values) in enumerate(zip(targets.ids, targets.weights)):
            np.add.at(weights[row], ids, values)
        found = p - weights
    np.testing.assert_allclose(error, np.square(found).sum(-1), rtol=2e-3, atol=1e-7)
    np.testing.assert_allclose(total, -found.sum(0), rtol=1e-3, atol=1e-5)


def test_schemes_are_set_up_for_the_ids_that_are_asked(measure):
    logits = jnp.concatenate([b.teacher_NV for b in Source().batches("train", 0, 256)])
    probs = scipy.special.softmax(np.asarray(logits, np.float64), axis=-1)
    tau = measure.calibration.scheme_for("threshold", logits, 9.0).tau
    assert np.minimum(1, probs / tau).sum(-1).mean() == pytest.approx(9, rel=1e-4)
    draws = measure.calibration.scheme_for("random_sampling", logits, 9.0).draws
    ids = [(1 - (1 - probs) ** n).sum(-1).mean() for n in (draws - 1, draws + 1)]
    assert ids[0] < 9 < ids[1]
    assert measure.calibration.scheme_for("top_k", logits, 9.0) == teachers.TopK(k=9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["top_k", "random_sampling", "threshold"])
def test_schemes_are_set_up_for_the_bytes_that_are_asked(measure, name):
    calibration = measure.calibration.Calibration(
        Source().batches("train", 0, 512), Source.token_counts
    )
    (scheme,) = {calibration.at_bytes(name, 17.0, (6, 9))}
    arrays = [
        measure.calibration.encode((scheme,), batch.teacher_NV, batch.labels_N, keys(128))[0]
        for batch in Source(1).batches("train", 0, 512)
    ]
    size = measure.calibration.record_bytes(scheme, arrays, Source.token_counts) / 512
    # k = 7 or 8 is as near as it gets.
    assert size == pytest.approx(17, abs=1.3 if name == "top_k" else 0.4)
    # What counts as bytes is what a store could be read from.
    codec = Codec(
        columns=scheme.columns(VOCAB),
        order=order.by_frequency(Source.token_counts),
        tokens=512,
        teacher="quality",
    )
    whole = {name: np.concatenate([some[name] for some in arrays]) for name in arrays[0]}
    record = codec.encode(whole, "row")
    assert len(record) == pytest.approx(size * 512, abs=1e-6)
    back = codec.decode(record, "row", scheme.width)
    np.testing.assert_array_equal(back["length"], whole["length"])


@pytest.mark.slow
def test_a_measurement_as_a_whole_and_in_parts(measure, monkeypatch, tmp_path):
    monkeypatch.setitem(measure.quality.SOURCES, "synthetic", Source)
    ask = lambda **more: measure.quality.measure(  # noqa: E731
        quick=True, on=("synthetic",), tokens=1024, **more
    )
    figures = ask()
    one = figures["synthetic"]
    rows = {row["scheme"]["name"]: row for row in one["rows"] if not row["alone"]}
    for name in ("top_k", "random_sampling", "threshold"):
        assert rows[name]["ids"] == pytest.approx(10, rel=0.05)
        assert 10 < rows[name]["bytes"] < 40
    ratio = rows["threshold"]["error"] / rows["random_sampling"]["error"]
    assert figures["mse_threshold_over_random"] == pytest.approx(ratio)
    assert 0.1 < ratio < 0.8
    assert 0 < rows["threshold"]["of_random_error"] < 0.2
    assert 0.3 < figures["bias_z_max"] < 4

    with pytest.raises(measure.quality.Unfinished, match="synthetic: 0 of 1024 tokens"):
        ask(work=tmp_path, minutes=-1)
    assert measure.quality.measure(quick=True, on=("synthetic",), work=tmp_path, tokens=512)
    assert ask(work=tmp_path) == figures
    with pytest.raises(artifacts.InputError, match=r"measured otherwise .*seed: 0 -> 1"):
        ask(work=tmp_path, seed=1)


def test_the_error_of_a_ratio_is_that_over_repetitions(measure):
    rng = np.random.default_rng(0)

    def once():
        theirs = rng.gamma(20.0, size=30)
        return measure.measured._ratio(0.5 * theirs + rng.gamma(9.0, size=30), theirs)

    ratios, uncertain = np.array([once() for _ in range(400)]).T
    assert uncertain.mean() == pytest.approx(ratios.std(), rel=0.1)
    assert measure.measured._ratio(np.ones(1), np.full(1, 4.0)) == (0.25, None)


@pytest.mark.slow
def test_a_bias_of_a_hundredth_is_seen(measure, monkeypatch):
    unpack = teachers.Threshold.unpack

    def biased(self, arrays):
        made = unpack(self, arrays)
        return made | {"weights": made["weights"] * np.float32(1.01)}

    monkeypatch.setattr(teachers.Threshold, "unpack", biased)
    entry = measure.errors.Entry("", teachers.Threshold(tau=0.05))
    assert max(measure.bias.bias([entry], one_batch(), 16, 0).values()) > 6
