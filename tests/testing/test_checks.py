import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from distill_jax import losses, testing

SKIP = {
    "adaptive_kl": ("numerical gradient", "top-k bucket"),
    "total_variation": ("zero gradient",),
}
PARAMETERS = {"alpha_beta_divergence": {"alpha": 0.2, "beta": 0.7}}


def mixture(a, b, share):
    return share * a + (1 - share) * b


def kl(p, q):
    return scipy.special.rel_entr(p, q).sum()


REFERENCES = {
    "forward_kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "jensen_shannon": lambda p, q: 0.5 * (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)),
    "skewed_forward_kl": lambda p, q: kl(p, mixture(p, q, 0.1)),
    "skewed_reverse_kl": lambda p, q: kl(q, mixture(q, p, 0.1)),
    "total_variation": lambda p, q: np.abs(p - q).sum() / 2,
    "adaptive_kl": None,
    "alpha_beta_divergence": None,
}


def check(name, **kwargs):
    report = testing.check_divergence(
        getattr(losses, name),
        reference=REFERENCES[name],
        skip=SKIP.get(name, ()),
        **PARAMETERS.get(name, {}),
        **kwargs,
    )
    assert not report.failed
    return report


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_divergences_of_ours_pass(name):
    report = check(name)
    assert len(report.passed) >= 23
    refused = set() if name == "forward_kl" else {"sampled"}
    assert report.refused.keys() == refused
    assert all("forward_kl, or store TopKTargets" in said for said in report.refused.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "adaptive_kl",
        "alpha_beta_divergence",
        "jensen_shannon",
        "skewed_forward_kl",
        "skewed_reverse_kl",
        "total_variation",
    ],
)
def test_the_other_divergences_pass_a_shorter_check(name):
    assert check(name, kinds=("top_k",), temperatures=(2.0,), examples=10).passed


@pytest.mark.slow
def test_a_divergence_passes_with_fewer_examples():
    report = testing.check_divergence(
        losses.forward_kl, kinds=("top_k",), temperatures=(1.0,), examples=3
    )
    assert report.passed
    assert "top-k bucket" in report.skipped  # without logits there is nothing to compare with
    table = str(report)
    assert table.splitlines()[0].split() == ["top_k"]
    assert "there are no dense targets to compare with" in table


@pytest.mark.slow
def test_hard_labels_pass():
    def reference(logits_V, targets):
        return scipy.special.logsumexp(logits_V) - logits_V[targets["labels"]]

    report = testing.check_objective(losses.hard_labels(), reference=reference)
    assert "reference" in report.passed
    assert "sharding" in report.passed
    assert report.skipped["teacher gradient"] == "it has no teacher"


@pytest.mark.slow
def test_hard_labels_with_z_loss_and_smoothing_pass():
    smooth = losses.hard_labels(z_loss=1e-3, label_smoothing=0.1)
    skip = "constant shift", "-inf in student", "padded vocabulary"
    report = testing.check_objective(smooth, skip=skip)
    assert {report.skipped[name] for name in skip} == {"by request"}


@pytest.mark.slow
def test_taid_passes():
    ramp = losses.taid("8b", lambda step: jnp.minimum(step / 10, 1.0), temperature=2.0)
    report = testing.check_objective(ramp, teachers=("8b",), step=5, skip=("numerical gradient",))
    assert set(report.refused) == {"top_k", "sampled"}


@pytest.mark.slow
def test_a_sum_over_two_teachers_passes_with_whatever_each_may_have():
    objective = losses.weighted_sum(
        hard=(0.1, losses.hard_labels(z_loss=1e-4)),
        small=(0.4, losses.distill("8b", losses.jensen_shannon)),
        large=(lambda step: 0.5 * step, losses.distill("70b", losses.forward_kl, temperature=2.0)),
    )
    report = testing.check_objective(
        objective,
        teachers=("8b", "70b"),
        temperature={"70b": 2.0},
        skip=("constant shift",),
        examples=10,
    )
    kinds = {result.targets for result in report.results}
    assert kinds == {"dense", "top_k", "8b=dense 70b=sampled"}
    assert not report.refused


@pytest.fixture
def failure():
    def shifted(logits_NV, targets, *, step=None):
        return jnp.max(logits_NV.astype(jnp.float32), axis=-1), {}

    with pytest.raises(testing.PropertyError) as caught:
        testing.check_objective(
            shifted, skip=testing.PROPERTIES.keys() - {"constant shift", "token order"}
        )
    return caught.value


def test_a_failure_names_the_property_and_shows_the_smallest_case(failure):
    assert isinstance(failure, AssertionError)
    assert failure.report.failed == ("constant shift",)
    text = str(failure)
    assert "1 property does not hold." in text
    assert "adding a constant to all of a token's logits" in text
    assert "smallest failing case: N = 1, V = 2, seed = " in text
    assert "logits = [[0.     , 0.00293]]" in text
    assert "labels = [0]" in text
    row = next(line for line in text.splitlines() if line.startswith("constant shift  "))
    assert row.split() == ["constant", "shift", "FAILS"]


def test_cases_are_the_same_every_time():
    def run():
        seen = []

        def objective(logits_NV, targets, *, step=None):
            jax.debug.callback(lambda logits: seen.append(np.array(logits)), logits_NV)
            return losses.hard_labels()(logits_NV, targets)

        testing.check_objective(
            objective, skip=testing.PROPERTIES.keys() - {"large logits"}, examples=5
        )
        jax.effects_barrier()
        return seen

    first, second = run(), run()
    assert len(first) == len(second) > 3
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_exception_is_a_failure_and_is_described():
    def fragile(logits_NV, targets, *, step=None):
        if logits_NV.dtype != jnp.float32:
            raise OverflowError("float32 only, please")
        return losses.hard_labels()(logits_NV, targets)

    with pytest.raises(testing.PropertyError, match="it raises OverflowError: float32 only"):
        testing.check_objective(fragile, skip=testing.PROPERTIES.keys() - {"dtype"})


def test_requests_that_make_no_sense_are_refused():
    hard = losses.hard_labels()
    with pytest.raises(ValueError, match="skip has no 'shift'; there are: shape, dtype"):
        testing.check_objective(hard, skip=("shift",))
    with pytest.raises(ValueError, match=r"skip must be several names, such as \('jit',\)"):
        testing.check_objective(hard, skip="jit")
    with pytest.raises(ValueError, match="kinds has no 'logits'"):
        testing.check_objective(hard, kinds=("logits",))


def test_teachers_that_do_not_fit_are_named():
    small = losses.distill("8b", losses.forward_kl, temperature=2.0)
    with pytest.raises(ValueError, match="no targets '8b'; there are labels"):
        testing.check_objective(small)
    with pytest.raises(ValueError, match=r"looks for targets '8b'.*by teachers="):
        testing.check_objective(lambda logits, targets, step=None: (targets["8b"], {}))
    with pytest.raises(ValueError, match=r"stored at temperature 1\.0") as caught:
        testing.check_objective(small, teachers=("8b",))
    assert caught.value.__notes__[-1:] == ["(the targets were: labels, '8b' top_k at T = 1.0)"]


def test_a_loss_that_takes_nothing_is_refused():
    def strict(student, teacher, *, temperature=1.0):
        raise TypeError("a picture, please")

    with pytest.raises(ValueError, match=r"takes no kind of targets \(dense: a picture, please; "):
        testing.check_divergence(strict)
    with pytest.raises(TypeError, match="a picture"):
        testing.check_divergence(strict, kinds=("dense",))


def test_hypothesis_is_asked_for_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(ImportError, match="needs hypothesis: pip install hypothesis"):
        testing.check_objective(losses.hard_labels())


def test_what_is_skipped_is_not_tried():
    report = testing.check_objective(losses.hard_labels(), skip=testing.PROPERTIES)
    assert not report.passed
    assert set(report.skipped) == set(testing.PROPERTIES)
