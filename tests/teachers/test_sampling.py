import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.teachers import sampling


def numpy_top_k(values, k):
    """Oracle: a stable sort of the whole vocabulary."""
    order = np.argsort(-values, axis=-1, kind="stable")[:, :k]
    return np.take_along_axis(values, order, axis=-1), order


@pytest.mark.parametrize(
    ("vocab", "k"), [(1, 1), (7, 7), (10, 3), (1000, 1), (1001, 17), (997, 32)]
)
@pytest.mark.parametrize("ties", [False, True])
def test_top_k_is_a_stable_sort(vocab, k, ties):
    rng = np.random.default_rng(vocab + k)
    values = rng.standard_normal((6, vocab)).astype(np.float32)
    if ties:
        values = np.round(values * 2) / 2
        values[0] = np.where(np.arange(vocab) % 3, 0.0, -0.0)
        values[1, : vocab // 2] = -np.inf
    top, ids = jax.jit(sampling.top_k, static_argnums=1)(values, k)
    expected, expected_ids = numpy_top_k(values, k)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(top, expected)
    outside = np.asarray(sampling.outside_top_k(jnp.asarray(values), top, ids))
    for row, chosen in enumerate(expected_ids):
        assert set(np.flatnonzero(outside[row])) == set(range(vocab)) - set(chosen.tolist())


def test_log_softmax_and_entropy_bear_impossible_ids():
    logits = np.array([[0.0, 1.0, -np.inf, 3.0], [1e4, -1e4, 0.0, 0.0]], np.float32)
    log_probs, entropy = sampling.log_softmax_and_entropy(jnp.asarray(logits))
    exact = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(axis=-1, keepdims=True))
    probs = np.exp(exact)
    surprise = np.where(probs > 0, -probs * np.where(probs > 0, exact, 0), 0)
    np.testing.assert_allclose(np.exp(log_probs), probs, rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(entropy, surprise.sum(axis=-1), rtol=1e-5, atol=1e-7)


def drawn(probs, draws, seed=0):
    """Draws of one distribution, with one key."""
    keys = sampling.token_keys(jnp.array([seed, 7], jnp.uint32), jnp.arange(1))
    return np.asarray(sampling.draw(keys, jnp.asarray(probs, jnp.float32)[None], draws))[0]


def test_draws_follow_the_distribution():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.full(57, 0.3))
    draws = 40_000
    counts = np.bincount(drawn(probs, draws), minlength=57)
    z = (counts - draws * probs) / np.sqrt(draws * probs * (1 - probs) + 1)
    # 57 standard normal deviates: the largest is below 4.5 but once in 2,500 seeds.
    assert np.abs(z).max() < 4.5


def test_an_impossible_id_is_never_drawn():
    probs = np.zeros(1000)
    probs[[3, 500, 998]] = 1e-30, 0.5, 0.5
    assert set(drawn(probs, 20_000).tolist()) <= {3, 500, 998}
    only = np.zeros(50)
    only[49] = 1.0
    assert set(drawn(only, 100).tolist()) == {49}


def test_ids_below_the_resolution_of_one_cumulative_sum_are_drawn_alike():
    """A million ids of 1.5e-8 each: one float32 cumulative sum could reach an eighth of them.

    Among about 3,000 draws from the tail 4.5 pairs are expected to be equal, and 36 if only
    an eighth of the ids could be drawn.
    """
    vocab = 1_000_000
    probs = jnp.full((1, vocab), 1.5e-8, jnp.float32).at[0, 0].set(1 - 1.5e-2)
    draw = jax.jit(sampling.draw, static_argnums=2)
    keys = sampling.token_keys(jnp.array([1, 2], jnp.uint32), jnp.arange(20))
    ids = np.concatenate([np.asarray(draw(keys[i : i + 1], probs, 10_000))[0] for i in range(20)])
    tail = ids[ids > 0]
    assert 2700 < len(tail) < 3300
    assert len(tail) - len(np.unique(tail)) < 15


def test_count_unique_is_numpy_unique():
    ids = np.random.default_rng(3).integers(0, 9, (20, 12)).astype(np.int32)
    ids[0] = 0
    unique, counts, lengths = map(np.asarray, sampling.count_unique(jnp.asarray(ids)))
    for row in range(len(ids)):
        expected, expected_counts = np.unique(ids[row], return_counts=True)
        length = lengths[row]
        np.testing.assert_array_equal(unique[row, :length], expected)
        np.testing.assert_array_equal(counts[row, :length], expected_counts)
        assert not unique[row, length:].any()
        assert not counts[row, length:].any()


def test_seeds_depend_on_content_and_teacher_alone():
    seeds = sampling.row_seeds(["a", "b", "c"], salt="teacher")
    np.testing.assert_array_equal(sampling.row_seeds(["c", "a"], salt="teacher"), seeds[[2, 0]])
    assert not (sampling.row_seeds(["a", "b", "c"], salt="other") == seeds).any()
    assert len(np.unique(seeds)) == 6


def test_token_keys_do_not_depend_on_the_session():
    seed = jnp.array([5, 6], jnp.uint32)
    here = jax.random.key_data(sampling.token_keys(seed, jnp.arange(4)))
    with jax.default_prng_impl("rbg"):
        there = jax.random.key_data(sampling.token_keys(seed, jnp.arange(4)))
    np.testing.assert_array_equal(here, there)
    assert len(np.unique(np.asarray(here), axis=0)) == 4
