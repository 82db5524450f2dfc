import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import losses
from distill_jax.losses import ensembles
from distill_jax.losses.objectives import token_weighted

from . import oracles

N, V = 6, 9
SHARES = {"8b": 0.3, "70b": 0.7}


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    student, small, large = jnp.asarray(rng.normal(size=(3, N, V)) * 2, jnp.float32)
    small = small.at[0, 3].set(-jnp.inf)
    large = large.at[0, 4].set(-jnp.inf)
    labels = jnp.asarray(rng.integers(0, V, N)).at[0].set(0)
    return student, {"labels": labels, "8b": small, "70b": large}


def mixed(targets, weights, temperature=1.0):
    return sum(
        np.reshape(np.asarray(weight, np.float64), (-1, 1))
        * oracles.softmax(targets[name], temperature)
        for name, weight in weights.items()
    )


def slope_of(objective, student, targets):
    return jax.jit(jax.grad(lambda student: objective(student, targets)[0].sum()))(student)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", sorted(oracles.DIVERGENCES))
def test_divergence_from_a_mixture_equals_definition(name, temperature, batch):
    student, targets = batch
    objective = ensembles.distill_mixture(SHARES, oracles.loss(name), temperature=temperature)
    p, q = mixed(targets, SHARES, temperature), oracles.softmax(student, temperature)
    expected = temperature**2 * oracles.divergence(name, p, q)
    np.testing.assert_allclose(objective(student, targets)[0], expected, rtol=2e-5, atol=2e-6)


def test_temperature_of_a_mixture_follows_a_schedule(batch):
    student, targets = batch
    objective = ensembles.distill_mixture(
        SHARES, losses.reverse_kl, temperature=lambda step: 1 + step
    )
    value = jax.jit(lambda step: objective(student, targets, step=step)[0])(2)
    p, q = mixed(targets, SHARES, 3.0), oracles.softmax(student, 3.0)
    np.testing.assert_allclose(value, 9 * oracles.kl(q, p), rtol=2e-5)
    samples = {
        name: oracles.sampled(np.zeros((N, V)), 2, np.random.default_rng(0)) for name in SHARES
    }
    with pytest.raises(ValueError, match="cannot serve a schedule of temperatures"):
        objective(student, samples, step=0)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_forward_kl_to_a_mixture_has_the_gradient_of_a_weighted_sum(temperature, batch):
    student, targets = batch
    kl = {name: losses.distill(name, losses.forward_kl, temperature=temperature) for name in SHARES}
    summed = losses.weighted_sum(**{f"of_{n}": (w, kl[n]) for n, w in SHARES.items()})
    mixture = ensembles.distill_mixture(SHARES, losses.forward_kl, temperature=temperature)
    slope = slope_of(mixture, student, targets)
    expected = oracles.softmax(student, temperature) - mixed(targets, SHARES, temperature)
    np.testing.assert_allclose(slope, temperature * expected, atol=2e-6)
    chex.assert_trees_all_close(slope, slope_of(summed, student, targets), atol=2e-6)


def test_weights_may_be_functions_of_the_token(batch):
    student, targets = batch
    weights = {name: ensembles.label_confidence(name) for name in SHARES}
    confidence = {name: np.asarray(weight(targets), np.float64) for name, weight in weights.items()}
    total = sum(confidence.values())
    p = mixed(targets, {name: value / total for name, value in confidence.items()})
    objective = ensembles.distill_mixture(weights, losses.reverse_kl)
    expected = oracles.kl(oracles.softmax(student), p)
    np.testing.assert_allclose(objective(student, targets)[0], expected, rtol=2e-5)
    unknown = {**targets, "labels": jnp.full(N, -100)}  # nobody is confident: equal shares
    p = mixed(targets, {"8b": 0.5, "70b": 0.5})
    expected = oracles.kl(oracles.softmax(student), p)
    np.testing.assert_allclose(objective(student, unknown)[0], expected, rtol=2e-5)


def test_a_teacher_of_weight_zero_changes_nothing(batch):
    student, targets = batch
    alone = ensembles.distill_mixture({"8b": 0.0, "70b": 1.0}, losses.reverse_kl)
    expected = losses.reverse_kl(student, targets["70b"])
    np.testing.assert_allclose(alone(student, targets)[0], expected, rtol=1e-5)


@pytest.mark.slow
def test_mixture_of_extreme_logits_is_finite():
    spread = jnp.asarray([[1e4, -1e4, 0.0, 5.0], [-1e4, 1e4, 3.0, 0.0]])
    for temperature in (1.0, 1e-3):
        objective = ensembles.distill_mixture(
            SHARES, losses.jensen_shannon, temperature=temperature
        )
        targets = {"8b": spread, "70b": -spread}
        value, pullback = jax.vjp(lambda x, o=objective, t=targets: o(x, t)[0], spread / 10)
        chex.assert_tree_all_finite((value, pullback(jnp.ones_like(value))))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_mixture_of_samples_is_unbiased_over_all_draws(temperature):
    """Every outcome of one draw from a teacher and two from another, weighted by its chance."""
    rng = np.random.default_rng(0)
    student, small, large = rng.normal(size=(3, 3))
    p = {"8b": oracles.softmax(small, temperature), "70b": oracles.softmax(large, temperature)}
    draws = np.asarray(list(itertools.product(range(3), repeat=3)))
    chance = p["8b"][draws[:, 0]] * p["70b"][draws[:, 1]] * p["70b"][draws[:, 2]]
    targets = {
        name: losses.SampledTargets(
            jnp.asarray(ids), jnp.full(ids.shape, 1.0 / ids.shape[1]), temperature
        )
        for name, ids in (("8b", draws[:, :1]), ("70b", draws[:, 1:]))
    }
    samples = ensembles.mixture(
        list(targets.values()), list(SHARES.values()), temperature=temperature
    )
    onehots = np.eye(3)[np.asarray(samples.ids)]
    mean = np.einsum("n,nk,nkv->v", chance, np.asarray(samples.weights), onehots)
    expected = SHARES["8b"] * p["8b"] + SHARES["70b"] * p["70b"]
    np.testing.assert_allclose(mean, expected, rtol=1e-6)

    objective = ensembles.distill_mixture(SHARES, losses.forward_kl, temperature=temperature)
    students = jnp.broadcast_to(jnp.asarray(student, jnp.float32), (len(draws), 3))
    slope = chance @ np.asarray(slope_of(objective, students, targets))
    gap = oracles.softmax(student, temperature) - expected
    np.testing.assert_allclose(slope, temperature * gap, atol=1e-6)


def test_samples_mix_with_weights_per_token(batch):
    _, targets = batch
    rng = np.random.default_rng(1)
    samples = [
        oracles.sampled(targets[name], draws, rng) for name, draws in (("8b", 2), ("70b", 3))
    ]
    share_N = jnp.linspace(0.0, 1.0, N)
    mixture = ensembles.mixture(samples, [share_N, 1 - share_N])
    np.testing.assert_array_equal(mixture.ids[:, :2], samples[0].ids)
    np.testing.assert_array_equal(mixture.ids[:, 2:], samples[1].ids)
    np.testing.assert_allclose(mixture.weights[:, :2].sum(-1), share_N, rtol=1e-6)
    np.testing.assert_allclose(mixture.weights.sum(-1), 1.0, rtol=1e-6)


@pytest.mark.slow
def test_teachers_get_no_gradient(batch):
    student, targets = batch
    weights = {name: ensembles.label_confidence(name) for name in SHARES}
    objective = token_weighted(
        ensembles.distill_mixture(weights, losses.jensen_shannon),
        ensembles.agreement("8b", "70b"),
    )

    def loss(teachers):
        return objective(student, {**targets, **teachers})[0].sum()

    def mixed_logit(teachers, share):
        mixture = ensembles.mixture(list(teachers.values()), [share, 1 - share])
        return mixture[1:, 0].sum()

    teachers = {name: targets[name] for name in SHARES}
    assert jax.grad(mixed_logit, argnums=1)(teachers, jnp.full(N, 0.5)).sum() == 0.0
    chex.assert_trees_all_equal(
        jax.grad(mixed_logit)(teachers, 0.5), jax.tree.map(jnp.zeros_like, teachers)
    )
    slopes = jax.grad(loss)(teachers)
    chex.assert_trees_all_equal(slopes, jax.tree.map(jnp.zeros_like, slopes))


def test_mixtures_that_cannot_be_are_refused(batch):
    student, targets = batch
    top_k = oracles.top_k(np.zeros((N, V)), 3)[0]
    samples = oracles.sampled(np.zeros((N, V)), 3, np.random.default_rng(0))
    mix, half = ensembles.mixture, [0.5, 0.5]
    with pytest.raises(
        TypeError, match=r"TopKTargets cannot be mixed.*weighted_sum of forward KLs"
    ):
        mix([top_k, top_k], half)
    with pytest.raises(TypeError, match="logits and SampledTargets cannot be mixed"):
        mix([samples, targets["8b"]], half)
    with pytest.raises(
        ValueError, match=r"stored at temperature 1.0 cannot give a mixture at .* 2"
    ):
        mix([samples, samples], half, temperature=2.0)
    with pytest.raises(ValueError, match=r"shapes \(6, 9\), \(5, 9\) cannot be mixed"):
        mix([targets["8b"], targets["8b"][1:]], half)
    with pytest.raises(ValueError, match=r"shapes \(6,\), \(5,\) cannot be mixed"):
        mix([samples, losses.SampledTargets(samples.ids[1:], samples.weights[1:])], half)
    with pytest.raises(ValueError, match="1 weights for 2 teachers"):
        mix([samples, samples], [1.0])
    for wrong in ({"8b": 0.5, "70b": 0.6}, {"8b": -0.5, "70b": 1.5}):
        with pytest.raises(ValueError, match="at least 0 and 1 in sum, got"):
            ensembles.distill_mixture(wrong, losses.forward_kl)
    with pytest.raises(ValueError, match="at least one teacher"):
        ensembles.distill_mixture({}, losses.forward_kl)
    with pytest.raises(ValueError, match="all numbers or all functions"):
        ensembles.distill_mixture({"8b": 0.5, "70b": lambda targets: 0.5}, losses.forward_kl)
    with pytest.raises(ValueError, match="no targets '405b'"):
        ensembles.distill_mixture({"405b": 1.0}, losses.forward_kl)(student, targets)
    with pytest.raises(TypeError, match="reverse_kl cannot be estimated from SampledTargets"):
        ensembles.distill_mixture({"s": 1.0}, losses.reverse_kl)(student, {"s": samples})


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_label_confidence_of_logits(temperature, batch):
    _, targets = batch
    p = oracles.softmax(targets["70b"], temperature)
    labels = jnp.asarray([4, 1, 0, -100, V, V - 1])  # ruled out; three in [0, V); two outside
    expected = [0.0, p[1, 1], p[2, 0], 0.0, 0.0, p[5, V - 1]]
    weight = ensembles.label_confidence("70b", temperature=temperature)
    np.testing.assert_allclose(weight({**targets, "labels": labels}), expected, rtol=1e-5)


def test_label_confidence_of_top_k_is_a_lower_bound(batch):
    _, targets = batch
    top_k, ids = oracles.top_k(targets["8b"], 3)
    p = oracles.softmax(targets["8b"])
    padded = losses.TopKTargets(
        jnp.concatenate([top_k.ids, targets["labels"][:, None]], axis=-1),
        jnp.pad(top_k.log_probs, ((0, 0), (0, 1)), constant_values=-jnp.inf),
        top_k.log_tail,
    )
    labels = np.asarray([*ids[:3, 1], *np.argsort(np.asarray(targets["8b"]))[3:, 0]])
    expected = [*p[np.arange(3), labels[:3]], 0.0, 0.0, 0.0]
    for stored in (top_k, padded):
        weight = ensembles.label_confidence("8b")({"8b": stored, "labels": jnp.asarray(labels)})
        np.testing.assert_allclose(weight, expected, rtol=1e-5)


def test_label_confidence_of_samples_counts_draws():
    samples = losses.SampledTargets(
        jnp.asarray([[2, 0, 2, 2], [1, 0, 3, 3]]),
        jnp.asarray([[0.25, 0.5, 0.25, 0.0], [0.5, 0.25, 0.25, 0.0]]),
    )
    weight = ensembles.label_confidence("8b")({"8b": samples, "labels": jnp.asarray([2, -100])})
    np.testing.assert_allclose(weight, [0.5, 0.0])


def jsd(p, q):
    middle = (p + q) / 2
    return (oracles.kl(p, middle) + oracles.kl(q, middle)) / 2


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_agreement_of_logits(temperature, batch):
    _, targets = batch
    p, q = (oracles.softmax(targets[name], temperature) for name in SHARES)
    expected = 1 - jsd(p, q) / np.log(2)
    names = {"temperature": temperature}
    agree = ensembles.agreement("8b", "70b", **names)(targets)
    np.testing.assert_allclose(agree, expected, rtol=1e-5)
    differ = ensembles.disagreement("70b", "8b", **names)(targets)
    np.testing.assert_allclose(agree + differ, 1.0, rtol=1e-6)


def test_agreement_lies_between_disjoint_and_equal(batch):
    _, targets = batch
    apart = jnp.where(jnp.arange(V) < 4, 0.0, -jnp.inf) * jnp.ones((N, 1))
    other = jnp.where(jnp.arange(V) < 4, -jnp.inf, 0.0) * jnp.ones((N, 1))
    apart, other = (jnp.where(jnp.isnan(side), 0.0, side) for side in (apart, other))
    agree = ensembles.agreement("a", "b")
    np.testing.assert_allclose(agree({"a": apart, "b": other}), 0.0, atol=1e-6)
    np.testing.assert_allclose(agree({"a": apart, "b": apart}), 1.0, atol=1e-6)
    top_k = oracles.top_k(targets["8b"], 4)[0]
    np.testing.assert_allclose(agree({"a": top_k, "b": top_k}), 1.0, atol=1e-6)
    assert bool(jnp.all(agree({"a": top_k, "b": targets["8b"]}) <= 1.0))


@pytest.mark.slow
def test_agreement_of_top_k_is_over_shared_ids_and_a_bucket(batch):
    _, targets = batch
    small, large = targets["8b"][1:], targets["70b"][1:]
    p, q = oracles.softmax(small), oracles.softmax(large)
    dense = 1 - jsd(p, q) / np.log(2)
    (one, ids_one), (two, ids_two) = oracles.top_k(small, 3), oracles.top_k(large, 5)
    expected = []
    for p_V, q_V, first, second in zip(p, q, ids_one, ids_two, strict=True):
        shared = np.asarray(sorted({*first} & {*second}), int)
        sides = (oracles.bucketed(side, shared) for side in (p_V, q_V))
        expected.append(1 - jsd(*sides) / np.log(2))
    assert len({len({*a} & {*b}) for a, b in zip(ids_one, ids_two, strict=True)}) > 1
    # Padding slots hold ids that the other teacher lists.
    padded = losses.TopKTargets(
        jnp.concatenate([jnp.asarray(ids_two[:, :2]), one.ids], axis=-1),
        jnp.pad(one.log_probs, ((0, 0), (2, 0)), constant_values=-jnp.inf),
        one.log_tail,
    )
    for first, second in ((one, two), (two, one), (padded, two), (two, padded)):
        agree = ensembles.agreement("a", "b")({"a": first, "b": second})
        np.testing.assert_allclose(agree, expected, rtol=1e-5, atol=1e-6)
    assert np.all(agree >= dense - 1e-6)
    whole = [oracles.top_k(side, V)[0] for side in (small, large)]
    agree = ensembles.agreement("a", "b")(dict(zip("ab", whole, strict=True)))
    np.testing.assert_allclose(agree, dense, rtol=1e-5, atol=1e-6)


def test_agreement_of_logits_and_top_k_is_over_its_ids(batch):
    _, targets = batch
    top_k, ids = oracles.top_k(targets["70b"], 3, 2.0)
    sides = (oracles.softmax(targets[name], 2.0) for name in SHARES)
    expected = 1 - jsd(*(oracles.bucketed(side, ids) for side in sides)) / np.log(2)
    agree = ensembles.agreement("a", "b", temperature=2.0)
    for pair in ((targets["8b"], top_k), (top_k, targets["8b"])):
        weight = agree(dict(zip("ab", pair, strict=True)))
        np.testing.assert_allclose(weight, expected, rtol=1e-5, atol=1e-6)


def test_weights_that_cannot_be_are_refused(batch):
    _, targets = batch
    top_k = oracles.top_k(np.zeros((N, V)), 3)[0]
    samples = oracles.sampled(np.zeros((N, V)), 3, np.random.default_rng(0))
    agree = ensembles.agreement("a", "b")
    for pair in ((samples, samples), (top_k, samples), (samples, targets["8b"])):
        with pytest.raises(TypeError, match="'a' and 'b' cannot be estimated from SampledTargets"):
            agree(dict(zip("ab", pair, strict=True)))
    for other in (top_k, targets["8b"]):
        with pytest.raises(
            ValueError, match=r"stored at temperature 1.0 cannot .* at temperature 2"
        ):
            ensembles.agreement("a", "b", temperature=2.0)({"a": top_k, "b": other})
    for stored in (top_k, samples):
        with pytest.raises(ValueError, match=r"1.0 cannot give a confidence at temperature 2"):
            ensembles.label_confidence("a", temperature=2.0)({**targets, "a": stored})
    with pytest.raises(ValueError, match="no targets 'labels'"):
        ensembles.label_confidence("8b")({"8b": top_k})
    with pytest.raises(ValueError, match="no targets 'b'"):
        agree({"a": top_k})


@pytest.mark.slow
def test_fused_head_with_masks_gives_what_whole_logits_give(batch):
    _, targets = batch
    rng = np.random.default_rng(3)
    hidden, unembedding = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((N, 4), (4, V))
    )
    where = jnp.asarray([1.0, 0.0, 0.5, 1.0, 0.0, 1.0])
    targets = {
        **targets,
        "labels": jnp.where(where == 0, -100, targets["labels"]),
        "samples": oracles.sampled(targets["70b"], 3, rng),
        "more samples": oracles.sampled(targets["8b"], 2, rng),
        "top_k": oracles.top_k(targets["70b"], 3)[0],
        "other top_k": oracles.top_k(targets["8b"], 4)[0],
    }
    objective = losses.weighted_sum(
        mixture=(0.4, ensembles.distill_mixture(SHARES, losses.reverse_kl, temperature=2.0)),
        sampled=(
            0.3,
            ensembles.distill_mixture({"samples": 0.4, "more samples": 0.6}, losses.forward_kl),
        ),
        sure=(
            0.2,
            token_weighted(
                losses.distill("top_k", losses.forward_kl), ensembles.label_confidence("8b")
            ),
        ),
        unsure=(
            0.1,
            token_weighted(losses.hard_labels(), ensembles.disagreement("top_k", "other top_k")),
        ),
    )

    def whole(hidden, unembedding):
        return losses.reduce(*objective(hidden @ unembedding, targets), where).mean()

    def fused(hidden, unembedding):
        return losses.fused_linear(objective, hidden, unembedding, targets, where, chunk=2).mean()

    results = [
        jax.jit(jax.value_and_grad(head, argnums=(0, 1), has_aux=True))(hidden, unembedding)
        for head in (whole, fused)
    ]
    chex.assert_tree_all_finite(results[0])
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-6)


def test_weights_per_token_must_fit():
    logits = jnp.zeros((3, 5))
    for shape in ((3, 1), (4,)):
        with pytest.raises(ValueError, match="do not fit teachers"):
            losses.mixture([logits, logits], [jnp.full(shape, 0.5)] * 2)
    with pytest.raises(ValueError, match="1 in sum"):
        losses.mixture([logits, logits], [np.float32(0.3), np.float32(0.3)])
