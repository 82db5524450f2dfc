import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.teachers import sampling

# Vocabularies of a million: here computing takes longer than compiling.
pytestmark = pytest.mark.usefixtures("optimised")


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


def drawn(probs, draws, seed=0):
    """Draws of one distribution, with one key."""
    keys = sampling.token_keys(jnp.array([seed, 7], jnp.uint32), jnp.arange(1))
    return np.asarray(sampling.draw(keys, jnp.asarray(probs, jnp.float32)[None], draws))[0]


@pytest.mark.slow
def test_draws_follow_the_distribution():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.full(57, 0.3))
    draws = 40_000
    counts = np.bincount(drawn(probs, draws), minlength=57)
    z = (counts - draws * probs) / np.sqrt(draws * probs * (1 - probs) + 1)
    # 57 standard normal deviates: the largest is below 4.5 but once in 2,500 seeds.
    assert np.abs(z).max() < 4.5


@pytest.mark.slow
def test_an_impossible_id_is_never_drawn():
    probs = np.zeros(1000)
    probs[[3, 500, 998]] = 1e-30, 0.5, 0.5
    assert set(drawn(probs, 20_000).tolist()) <= {3, 500, 998}
    only = np.zeros(50)
    only[49] = 1.0
    assert set(drawn(only, 100).tolist()) == {49}


@pytest.mark.slow
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


@pytest.mark.parametrize("vocab", [1, 2, 50, 1001, 300_000])
def test_locate_is_a_search_in_the_running_sum(vocab):
    """Exactly, where one step in 2^31 is far below what a sum in float32 can tell."""
    rng = np.random.default_rng(vocab)
    steps = rng.integers(0, 2**31 // vocab, (3, vocab)) * (rng.random((3, vocab)) < 0.5)
    steps[:, rng.integers(vocab)] += 1
    running = np.cumsum(steps.astype(np.uint64), axis=-1)
    edges = np.concatenate([running[:, -1:] * 0, running[:, -1:] - 1, running[:, :3] - 1], axis=-1)
    drawn = rng.integers(0, running[:, -1:], (3, 200))
    targets = np.concatenate([np.clip(edges.astype(np.int64), 0, None), drawn], axis=-1)
    found = sampling.locate(jnp.asarray(steps, jnp.uint32), jnp.asarray(targets, jnp.uint32))
    for row in range(3):
        expected = np.searchsorted(running[row], targets[row].astype(np.uint64), side="right")
        np.testing.assert_array_equal(found[row], np.minimum(expected, vocab - 1))


def test_steps_are_right_on_average_however_small_the_fraction():
    """Over evenly spaced random numbers, which stand for all of them."""
    fractions = np.array([0, 1e-13, 3e-10, 1e-6, 0.3, 1 - 2.0**-24, 1], np.float32)
    bits = (np.arange(2**16, dtype=np.uint64) << 16).astype(np.uint32)
    one = 1 << 24
    found = sampling.steps(jnp.tile(fractions, (len(bits), 1)), one, jnp.asarray(bits))
    mean = np.asarray(found).astype(np.float64).mean(axis=0)
    expected = fractions.astype(np.float64) * one
    np.testing.assert_allclose(mean, expected, rtol=0, atol=2.0**-16)
    assert mean[0] == 0
    assert mean[-1] == one
    assert np.asarray(found).max() == one


def test_steps_of_equal_ids_add_up():
    """The errors of a hundred thousand ids far below one step cancel in every token."""
    fractions = jnp.full((4, 100_000), 1e-9, jnp.float32)
    bits = jnp.array([0, 1, 2**31, 2**32 - 1], jnp.uint32)
    total = np.asarray(sampling.steps(fractions, 1 << 24, bits)).sum(axis=-1)
    np.testing.assert_allclose(total, 100_000 * 1e-9 * 2**24, atol=2)


def picked(chances, width, rows, seed=0):
    """The ids that each of many tokens of the same chances picks."""
    keys = sampling.token_keys(jnp.array([seed, 3], jnp.uint32), jnp.arange(rows))
    many = jnp.tile(jnp.asarray(chances, jnp.float32), (rows, 1))
    ids, lengths = jax.jit(sampling.systematic, static_argnums=2)(keys, many, width)
    return np.asarray(ids), np.asarray(lengths)


def test_systematic_picks_each_id_with_its_chance():
    rng = np.random.default_rng(0)
    chances = rng.random(203) ** 3
    chances[[0, 77, 202]] = 1, 1, 0
    rows, expected = 4000, chances.sum()
    ids, lengths = picked(chances, 80, rows)
    # A systematic sample has one size or the next: the sum of the chances, rounded either way.
    assert set(lengths.tolist()) == {int(expected), int(expected) + 1}
    counts = np.zeros(203)
    for row, length in zip(ids, lengths):
        assert (np.diff(row[:length]) > 0).all()  # rising, so none comes twice
        assert not row[length:].any()
        counts[row[:length]] += 1
    assert counts[0] == counts[77] == rows
    assert counts[202] == 0
    z = (counts - rows * chances) / np.sqrt(rows * chances * (1 - chances) + 1e-9)
    assert np.abs(z[1:77]).max() < 4
    assert 0.6 < np.mean(z[1:77] ** 2) < 1.4
    share = np.sqrt((expected % 1) * (1 - expected % 1) / rows)
    assert abs(lengths.mean() - expected) < 4 * share


@pytest.mark.slow
def test_systematic_reaches_a_hundred_thousand_unlikely_ids_alike():
    vocab, rows = 100_001, 400
    chances = np.full(vocab, 5.5e-5)
    chances[70_000] = 1
    ids, lengths = picked(chances, 12, rows)
    assert set(lengths.tolist()) == {6, 7}
    # The picks of one token are a fixed distance apart, so only its first is random.
    first = ids[:, 0] / (1 / 5.5e-5)
    assert first.max() <= 1
    odd, low, inner = ids[:, 0] % 2, first < 0.5, ids[:, 0] % 300 < 150
    np.testing.assert_allclose([odd.mean(), low.mean(), inner.mean()], 0.5, atol=2 / np.sqrt(rows))


@pytest.mark.parametrize("vocab", [1, 2, 1000])
def test_systematic_of_one_certain_id(vocab):
    chances = np.zeros(vocab)
    chances[-1] = 1
    ids, lengths = picked(chances, 2, 50)
    assert (lengths == 1).all()
    assert (ids[:, 0] == vocab - 1).all()


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
