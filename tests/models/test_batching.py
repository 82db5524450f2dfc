"""Many texts in few rows: continuous batching, shared prompts, two models, devices."""

import jax
import numpy as np
import pytest
import scipy.special
from test_generation import CONFIG, GREEDY, assert_close, assert_frequencies

from distill_jax import losses, models
from distill_jax.artifacts import InputError
from distill_jax.models import Sampling, batching, decoding

TEACHER_CONFIG = models.LlamaConfig(
    vocab_size=23, embed=12, mlp=20, layers=3, heads=2, kv_heads=1, head_dim=8, tied=True,
    context=10**6,
)  # fmt: skip
STOPS = (3, 11, 17)


@pytest.fixture(scope="module")
def model(random_model):
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def teacher(random_model):
    return random_model(TEACHER_CONFIG)


@pytest.fixture(scope="module")
def score():
    """`score(model, prompt, tokens)`: log p of tokens [T, V] by one pass without a cache."""
    forward = jax.jit(models.logits, static_argnums=0)

    def apply(model, prompt, tokens):
        text = [*prompt, *tokens]
        padded, segments = np.zeros((2, 1, 256), np.int32)
        padded[0, : len(text)], segments[0, : len(text)] = text, 1
        logits = np.asarray(forward(model.config, model.params, padded, segments))[0]
        before = len(prompt) - 1
        return scipy.special.log_softmax(
            logits[before : before + len(tokens)].astype(np.float64), axis=-1
        )

    return apply


def of_drawn(log_probs, tokens):
    return log_probs[np.arange(len(tokens)), tokens]


def uneven_prompts(count, longest=40):
    random = np.random.default_rng(0)
    lengths = random.integers(1, longest, count)
    return [random.integers(0, 23, length).tolist() for length in lengths]


def counted(monkeypatch, name):
    """Every (arguments, result) of a compiled step."""
    calls = []
    step = getattr(decoding, name)

    def call(*arguments, **options):
        # Before the call, which uses the rows up.
        slots = [a.caches[0][0].key_RKCS.shape[-1] for a in arguments
                 if isinstance(a, decoding.Rows)]  # fmt: skip
        result = step(*arguments, **options)
        calls.append((arguments, result, slots))
        return result

    monkeypatch.setattr(decoding, name, call)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize(("prompt", "limit"), [(20, 150), (70, 400)])
def test_the_sizes_of_a_cache_are_known_before(model, monkeypatch, prompt, limit):
    """Of texts of one length that are written side by side, and which nothing ends."""
    made, moved = counted(monkeypatch, "empty"), counted(monkeypatch, "move")
    models.generate(model, [[5] * prompt] * 2, max_new_tokens=limit, sampling=GREEDY, seeds=[0, 1])
    sizes = [rows.caches[0][0].key_RKCS.shape[-1] for _, rows, _ in made + moved]
    assert sorted(set(sizes)) == batching.cache_slots(prompt, limit)


@pytest.mark.slow
def test_rows_that_end_are_given_to_waiting_texts(model, score, monkeypatch):
    prompts = uneven_prompts(40)
    kwargs = {
        "max_new_tokens": 60, "sampling": Sampling(), "seeds": range(40), "stop_ids": STOPS,
    }  # fmt: skip
    calls = counted(monkeypatch, "extend")
    refilled = models.generate(model, prompts, batch_rows=8, **kwargs)
    steps = sum(int(taken) for _, (_, _, taken), _ in calls)
    assert_close(refilled, models.generate(model, prompts, batch_rows=64, **kwargs))
    for prompt, text in zip(prompts, refilled):
        expected = score(model, prompt, text.tokens)
        np.testing.assert_allclose(text.log_probs, of_drawn(expected, text.tokens), atol=1e-5)
        assert text.finished == (text.tokens[-1] in STOPS)
        assert text.finished or len(text.tokens) == 60
    # One batch after another takes as many steps as the longest of each.
    lengths = [len(refilled[text].tokens) for text in np.argsort([len(p) for p in prompts])]
    in_turn = sum(max(lengths[first : first + 8]) - 1 for first in range(0, 40, 8))
    assert steps < 0.75 * in_turn


@pytest.mark.slow
def test_the_cache_grows_with_the_texts_and_stays_exact(model, score, monkeypatch):
    # The last prompt joins when the others have ended, and is longer than all that was held.
    prompts = [*uneven_prompts(5), np.random.default_rng(1).integers(0, 23, 150).tolist()]
    calls = counted(monkeypatch, "extend")
    texts = models.generate(
        model, prompts, max_new_tokens=100, sampling=Sampling(), seeds=range(6), batch_rows=4
    )
    for prompt, text in zip(prompts, texts):
        expected = of_drawn(score(model, prompt, text.tokens), text.tokens)
        np.testing.assert_allclose(text.log_probs, expected, atol=1e-5)
    slots = [sizes[0] for *_, sizes in calls]
    assert slots[0] == 160  # 32 for the first prompts and 100 for what comes after them, rounded
    assert slots == sorted(slots)
    assert slots[-1] < 512


@pytest.mark.slow
def test_samples_of_a_prompt_share_one_reading(model, monkeypatch):
    prompts = uneven_prompts(3)
    repeated = [prompts[index % 3] for index in range(30)]
    kwargs = {"max_new_tokens": 12, "sampling": Sampling()}
    calls = counted(monkeypatch, "read")
    together = models.generate(model, repeated, seeds=range(30), batch_rows=8, **kwargs)
    assert sum(int(np.sum(np.asarray(call[0][3]) > 0)) for call in calls) == 3
    alone = [
        models.generate(model, [prompt], seeds=[seed], **kwargs)[0]
        for seed, prompt in enumerate(repeated)
    ]
    assert_close(together, alone)


@pytest.mark.slow
def test_short_prompts_are_read_many_at_once_and_long_ones_few(model, monkeypatch):
    prompts = uneven_prompts(21, longest=60)
    kwargs = {"max_new_tokens": 3, "sampling": Sampling(), "seeds": range(21), "batch_rows": 16}
    calls = counted(monkeypatch, "read")
    together = models.generate(model, prompts, **kwargs)
    assert [call[0][2].shape[0] for call in calls] == [16, 8]
    calls.clear()
    monkeypatch.setattr(batching, "_READ_TOKENS", 100)
    assert_close(models.generate(model, prompts, **kwargs), together)
    # 4 x 16 slots, 2 x 32 and 2 x 48, an eighth of the rows although 2 x 64 is more, and the rest.
    assert [call[0][2].shape[0] for call in calls] == [4, 2, 2, 2, 2, 2, 2, 2, 2, 1]
    assert sum(int(np.sum(np.asarray(call[0][3]) > 0)) for call in calls) == 21


@pytest.mark.slow
def test_tokens_are_handed_out_as_they_come(model):
    prompts = uneven_prompts(6)
    kwargs = {
        "max_new_tokens": 20, "sampling": Sampling(), "seeds": range(6), "stop_ids": STOPS,
    }  # fmt: skip
    pieces = []
    texts = models.generate(
        model, prompts, batch_rows=2, on_tokens=lambda text, new: pieces.append((text, new)),
        **kwargs,
    )  # fmt: skip
    for index, text in enumerate(texts):
        mine = [new for piece, new in pieces if piece == index]
        assert [token for new in mine for token in new] == text.tokens
        assert all(0 < len(new) <= 4 for new in mine)
    assert_close(texts, models.generate(model, prompts, **kwargs))


@pytest.mark.slow
def test_a_teacher_is_mixed_in(model, teacher, score):
    prompts = uneven_prompts(10)
    texts = models.generate(
        model, prompts, max_new_tokens=20, sampling=Sampling(), seeds=range(10), batch_rows=4,
        teacher=teacher, teacher_share=0.3,
    )  # fmt: skip
    for prompt, text in zip(prompts, texts):
        for one, found in ((model, text.log_probs), (teacher, text.teacher_log_probs)):
            expected = of_drawn(score(one, prompt, text.tokens), text.tokens)
            np.testing.assert_allclose(found, expected, atol=1e-5)
    student, theirs = (
        np.array([getattr(text, name) for text in texts])
        for name in ("log_probs", "teacher_log_probs")
    )
    mixed = losses.mix_log_probs(student, theirs, teacher_share=0.3)
    weights = np.asarray(losses.importance_weights(student, mixed, np.ones_like(student)))
    mixture = 0.3 * np.exp(theirs) + 0.7 * np.exp(student)
    np.testing.assert_allclose(weights, np.exp(student) / mixture, rtol=1e-4)
    alone = models.generate(
        model, prompts[:1], max_new_tokens=1, sampling=Sampling(), seeds=[0]
    )  # fmt: skip
    assert alone[0].teacher_log_probs is None


@pytest.mark.slow
def test_a_mixture_is_drawn_from_as_it_is(model, teacher, score):
    prompt, draws, share = [3, 1, 4], 4096, 0.6
    texts = models.generate(
        model, [prompt] * draws, max_new_tokens=2, sampling=Sampling(), seeds=range(draws),
        batch_rows=draws, teacher=teacher, teacher_share=share,
    )  # fmt: skip

    def mixture(prefix):
        student, theirs = (np.exp(score(one, prefix, [0])[0]) for one in (model, teacher))
        return share * theirs + (1 - share) * student

    second = np.array([mixture([*prompt, token]) for token in range(23)])
    assert_frequencies(texts, mixture(prompt)[:, None] * second)


def spread(model, mesh):
    """A model with neurons and heads over "tensor" and the embedding over "fsdp"."""
    mesh_axis = {"mlp": "tensor", "heads": "tensor", "kv_heads": "tensor", "embed": "fsdp"}
    params = jax.tree.map(
        lambda axes, leaf: jax.device_put(
            leaf, jax.NamedSharding(mesh, jax.P(*map(mesh_axis.get, axes)))
        ),
        models.logical_axes(model.config),
        model.params,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    return models.Model(model.config, params)


@pytest.mark.slow
def test_eight_devices_write_what_one_writes(model, monkeypatch):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"),
                         axis_types=(jax.sharding.AxisType.Auto,) * 3)  # fmt: skip
    prompts = uneven_prompts(24)
    kwargs = {
        "max_new_tokens": 120, "sampling": Sampling(), "seeds": range(24), "stop_ids": STOPS[:1],
        "batch_rows": 8,
    }  # fmt: skip
    expected = models.generate(model, prompts, **kwargs)
    calls = counted(monkeypatch, "extend")
    rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    assert_close(models.generate(spread(model, mesh), prompts, sharding=rows, **kwargs), expected)
    for _, (state, _, _), _ in calls:
        for leaf in jax.tree.leaves(state.caches):
            assert leaf.sharding.spec[:2] == (("data", "fsdp"), "tensor")
            assert leaf.sharding.shard_shape(leaf.shape)[:2] == (2, 1)
        assert state.token_R.sharding.spec[0] == ("data", "fsdp")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"teacher_share": 1.0}, "teacher_share is 1.0"),
        ({"sampling": Sampling(top_k=3)}, "cannot be mixed"),
        ({"sampling": GREEDY}, "cannot be mixed"),
    ],
)
def test_wrong_mixtures_are_refused(model, teacher, change, complaint):
    request = {"max_new_tokens": 1, "sampling": Sampling(), "seeds": [0], "teacher": teacher}
    with pytest.raises(InputError, match=complaint):
        models.generate(model, [[1]], **(request | change))


def test_a_teacher_of_another_vocabulary_is_refused(model, random_model):
    config = models.LlamaConfig(
        vocab_size=24, embed=12, mlp=20, layers=1, heads=2, kv_heads=1, head_dim=8, tied=True
    )
    with pytest.raises(InputError, match="vocabulary has 24 tokens, the model's 23"):
        models.generate(
            model, [[1]], max_new_tokens=1, sampling=Sampling(), seeds=[0],
            teacher=random_model(config),
        )  # fmt: skip
