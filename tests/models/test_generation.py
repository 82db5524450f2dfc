import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from distill_jax import models
from distill_jax.artifacts import InputError
from distill_jax.models import Sampling, decoding
from distill_jax.models.sampling import draw

CONFIG = models.LlamaConfig(
    vocab_size=23,
    embed=16,
    mlp=24,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=6,
    tied=False,
    rope_theta=100.0,
    rope_scaling=models.RopeScaling(factor=4.0, original_context=16),
    context=10**6,
)
GREEDY = Sampling(temperature=0.0)
PROMPTS = [[3, 1, 4, 1, 5], [9], list(range(22, 0, -1)), [2, 6], [5, 3, 5, 8, 9, 7, 9], [9, 3]]


@pytest.fixture(scope="module")
def model(random_model):
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def next_log_probs(model):
    """log p(next token | prefix) by one forward pass over the whole prefix, without a cache."""

    @jax.jit
    def forward(tokens_BT, segment_ids_BT):
        return models.logits(CONFIG, model.params, tokens_BT, segment_ids_BT)

    def apply(prefix):
        tokens, segments = np.zeros((2, 1, 256), np.int32)
        tokens[0, : len(prefix)] = prefix
        segments[0, : len(prefix)] = 1
        logits = np.asarray(forward(tokens, segments))[0, len(prefix) - 1]
        return scipy.special.log_softmax(logits.astype(np.float64))

    return apply


def assert_close(left, right):
    assert [c.tokens for c in left] == [c.tokens for c in right]
    assert [c.finished for c in left] == [c.finished for c in right]
    for a, b in zip(left, right):
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-5)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling()])
def test_the_cache_gives_what_recomputing_the_prefix_gives(model, next_log_probs, sampling):
    completions = models.generate(
        model, PROMPTS, max_new_tokens=20, sampling=sampling, seeds=range(6)
    )
    for prompt, completion in zip(PROMPTS, completions):
        assert len(completion.tokens) == len(completion.log_probs) == 20
        assert not completion.finished
        prefix = list(prompt)
        for token, log_prob in zip(completion.tokens, completion.log_probs):
            expected = next_log_probs(prefix)
            if sampling is GREEDY:
                assert token == expected.argmax()
            assert log_prob == pytest.approx(expected[token], abs=1e-5)
            prefix.append(token)


@pytest.mark.slow
def test_a_row_does_not_depend_on_its_neighbours(model):
    def run(rows, **kwargs):
        return models.generate(
            model,
            [PROMPTS[row] for row in rows],
            max_new_tokens=20,
            sampling=Sampling(),
            seeds=[100 + row for row in rows],
            **kwargs,
        )

    together = run(range(6))
    assert len({tuple(completion.tokens) for completion in together}) == 6
    assert_close(run(range(6)[::-1])[::-1], together)
    assert_close(run(range(6), batch_rows=2), together)
    assert_close(run([2]), [together[2]])


def test_seeds_alone_make_equal_prompts_differ(model):
    completions = models.generate(
        model,
        [PROMPTS[2]] * 6,
        max_new_tokens=20,
        sampling=Sampling(),
        seeds=[7, 8, 7, 2**32 - 1, 0, 8],
    )
    tokens = [completion.tokens for completion in completions]
    assert tokens[0] == tokens[2]
    assert tokens[1] == tokens[5]
    assert len({tuple(row) for row in tokens}) == 4


def test_a_stop_id_ends_its_row_and_no_other(model):
    def run(stop_ids):
        return models.generate(
            model, PROMPTS, max_new_tokens=20, sampling=GREEDY, seeds=[0] * 6, stop_ids=stop_ids
        )

    free = run(())
    stop_ids = [free[0].tokens[4], free[2].tokens[0]]
    for stopped, whole in zip(run(stop_ids), free):
        ends = [i for i, token in enumerate(whole.tokens) if token in stop_ids]
        length = ends[0] + 1 if ends else 20
        assert stopped.tokens == whole.tokens[:length]
        assert len(stopped.log_probs) == length
        assert stopped.finished == bool(ends)
    assert len(run(stop_ids)[2].tokens) == 1


@pytest.mark.slow
def test_generation_ends_when_every_row_has_stopped(model, monkeypatch):
    steps = []

    def counted(*args):
        jax.debug.callback(lambda: steps.append(1))
        return draw(*args)

    monkeypatch.setattr(decoding, "draw", counted)
    # A bucket of its own, so that the counter is compiled in.
    completions = models.generate(
        model,
        PROMPTS,
        max_new_tokens=900,
        sampling=Sampling(temperature=3.0),
        seeds=range(6),
        stop_ids=range(1, 23, 2),
    )
    jax.effects_barrier()
    assert all(completion.finished for completion in completions)
    # The prompts are read together, and their first tokens drawn together.
    assert len(steps) == max(len(completion.tokens) for completion in completions) > 2


def truncated(log_probs, sampling):
    """Temperature, top-k, top-p, min-p one after another, in float64, from their definitions."""
    probs = scipy.special.softmax(log_probs / sampling.temperature)
    order = np.argsort(-probs)
    kept = order[: sampling.top_k or len(order)]
    if sampling.top_p:
        mass = np.cumsum(probs[kept]) / probs[kept].sum()
        kept = kept[: np.searchsorted(mass, sampling.top_p) + 1]
    if sampling.min_p:
        kept = kept[probs[kept] >= sampling.min_p * probs[kept].max()]
    out = np.zeros_like(probs)
    out[kept] = probs[kept] / probs[kept].sum()
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampling", "support"),
    [
        (Sampling(top_k=3), 3),
        (Sampling(temperature=0.8, top_k=20, top_p=0.95, min_p=0.1), None),
    ],
)
def test_pairs_of_tokens_have_the_right_frequencies(model, next_log_probs, sampling, support):
    prompt, draws = [3, 1, 4], 4096
    completions = models.generate(
        model,
        [prompt] * draws,
        max_new_tokens=2,
        sampling=sampling,
        seeds=range(draws),
        batch_rows=draws,
    )
    first = truncated(next_log_probs(prompt), sampling)
    second = [truncated(next_log_probs([*prompt, token]), sampling) for token in range(23)]
    expected = first[:, None] * np.array(second)
    if support:
        assert (expected > 0).sum() == support**2
    assert_frequencies(completions, expected)


def assert_frequencies(completions, probabilities):
    """Texts of two tokens come as often as their probabilities [V, V] say."""
    counts = np.zeros_like(probabilities)
    np.add.at(counts, tuple(np.array([completion.tokens for completion in completions]).T), 1)
    expected = probabilities * len(completions)
    assert not counts[expected == 0].any()
    large = expected >= 5
    observed = [*counts[large], counts[~large].sum()]
    wanted = [*expected[large], expected[~large].sum()]
    if not wanted[-1]:
        observed, wanted = observed[:-1], wanted[:-1]
    assert len(wanted) > 8
    assert scipy.stats.chisquare(observed, wanted).pvalue > 0.001


@pytest.mark.slow
def test_bfloat16_parameters_generate(model, next_log_probs):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)
    completion = models.generate(
        models.Model(CONFIG, half), [[3, 1, 4]], max_new_tokens=2, sampling=GREEDY, seeds=[0]
    )[0]
    first = next_log_probs([3, 1, 4])[completion.tokens[0]]
    assert completion.log_probs[0] == pytest.approx(first, abs=0.3)


def test_no_prompts_give_no_completions(model):
    assert models.generate(model, [], max_new_tokens=1, sampling=GREEDY, seeds=[]) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1], [23]]}, "prompt 1 has ids from 23 to 23"),
        ({"prompts": [[-1], [2]]}, "prompt 0 has ids from -1"),
        ({"seeds": [1]}, "2 prompts but 1 seeds"),
        ({"seeds": [1, -1]}, "seed 1 is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 10**6}, "passes the model's context"),
        ({"batch_rows": 0}, "batch_rows is 0"),
    ],
)
def test_wrong_requests_are_refused(model, change, complaint):
    request = {"prompts": [[1], [2]], "seeds": [0, 0], "max_new_tokens": 1, "sampling": GREEDY}
    with pytest.raises(InputError, match=complaint):
        models.generate(model, **(request | change))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 1.1},
        {"min_p": 0.0},
    ],
)
def test_wrong_sampling_is_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Sampling(**wrong)
