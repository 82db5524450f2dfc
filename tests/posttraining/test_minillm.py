"""MiniLLM's gradient over batches as a run makes them, against the KL of whole answers."""

import itertools

import jax
import numpy as np
import pytest
import scipy.special
from on_policy_parts import END, ONE, TOKENIZER, model_of
from pruning import numpy_llama

from distill_jax.models import Completion
from distill_jax.posttraining import OnPolicyConfig, Rollouts, on_policy_loss, rollouts
from distill_jax.training import TrainConfig

V, HORIZON = 3, 3
PROMPT = [0, 1]
ANSWERS = [
    answer
    for length in range(1, HORIZON + 1)
    for answer in itertools.product(range(V), repeat=length)
    if END not in answer[:-1] and (length == HORIZON or answer[-1] == END)
]
EXACT = {"reward_clip": np.inf, "length_normalised": False, "whitening": False}


@pytest.fixture(autouse=True)
def stops(monkeypatch):
    monkeypatch.setattr(rollouts, "stop_ids", lambda *_: (END,))


def log_probs(model, params, sequences):
    """log p of all answers' tokens [A, T] in float64 NumPy, 0 where there is none."""
    tokens = np.zeros((len(sequences), len(PROMPT) + HORIZON), int)
    where = np.zeros((len(sequences), HORIZON), bool)
    for row, answer in enumerate(sequences):
        tokens[row, : len(PROMPT) + len(answer)] = [*PROMPT, *answer]
        where[row, : len(answer)] = True
    segments = np.ones_like(tokens)
    logits = numpy_llama.logits(model.config, params, tokens, segments, tied=False)
    found = scipy.special.log_softmax(logits[:, len(PROMPT) - 1 : -1], axis=-1)
    answers = tokens[:, len(PROMPT) :, None]
    return np.where(where, np.take_along_axis(found, answers, axis=-1)[..., 0], 0.0)


def sequence_kl(student, teacher, params):
    """KL(student || teacher) between distributions of whole answers, by its definition."""
    log_q, log_p = (
        log_probs(*one, ANSWERS).sum(-1) for one in ((student, params), (teacher, teacher.params))
    )
    np.testing.assert_allclose(np.exp(log_q).sum(), 1.0)
    return np.sum(np.exp(log_q) * (log_q - log_p))


def directions(params, count=4):
    source = np.random.default_rng(9)
    return [jax.tree.map(lambda leaf: source.normal(size=leaf.shape), params) for _ in range(count)]


def slopes(student, teacher, step=1e-4):
    """Of the KL of whole answers along `directions`, in float64."""

    def moved(direction, by):
        return jax.tree.map(
            lambda leaf, change: np.asarray(leaf, np.float64) + by * change,
            student.params,
            direction,
        )

    return np.array(
        [
            sum(
                sign * sequence_kl(student, teacher, moved(direction, sign * step))
                for sign in (1, -1)
            )
            / (2 * step)
            for direction in directions(student.params)
        ]
    )


def along(gradient):
    """A gradient's products with the `directions`."""
    products = [
        jax.tree.map(lambda g, d: np.sum(np.asarray(g, np.float64) * d), gradient, direction)
        for direction in directions(gradient)
    ]
    return np.array([sum(jax.tree.leaves(one)) for one in products])


def minillm(rows, share, **options):
    """A student, a teacher, batches of so many rows for one prompt, and the slopes of their sum."""
    student, teacher = model_of(0, V), model_of(1, V)
    config = OnPolicyConfig(
        method="minillm",
        sequence_length=len(PROMPT) + HORIZON,
        max_new_tokens=HORIZON,
        teacher_share=share,
        whole_weights=True,
        rows_at_once=4096,
        **EXACT,
        **options,
    )
    made = Rollouts(
        student.config, teacher, TOKENIZER, config, TrainConfig(steps=1, batch_rows=rows),
        [PROMPT], mesh=ONE,
    )  # fmt: skip
    loss_fn = on_policy_loss(student.config, teacher.config, config)

    @jax.jit
    def gradient(batch):
        frozen = {"teacher": teacher.params}
        return jax.grad(lambda params: loss_fn(params, batch, 0, frozen).loss)(student.params)

    return student, teacher, made, gradient


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.2])
def test_minillms_expected_gradient_is_that_of_the_kl_of_whole_answers(share, monkeypatch):
    """Every answer once, each as heavy as the sampler would draw it."""
    student, teacher, made, gradient = minillm(len(ANSWERS), share)
    every = [Completion(list(answer), [], False) for answer in ANSWERS]
    monkeypatch.setattr(rollouts, "generate", lambda *_, **__: every)
    made.draw(student.params, 1)
    batch = next(made)
    answers = [
        row["tokens"][np.flatnonzero(row["where"]) + 1].tolist()
        for row in (jax.tree.map(lambda leaf, i=i: leaf[i], batch) for i in range(len(ANSWERS)))
    ]
    assert sorted(map(tuple, answers)) == sorted(ANSWERS)
    q, p = (
        np.exp(log_probs(*one, answers))
        for one in ((student, student.params), (teacher, teacher.params))
    )
    drawn = (share * p + (1 - share) * q).prod(-1)
    np.testing.assert_allclose(drawn.sum(), 1.0, rtol=1e-5)
    weighed = batch | {"where": np.float32(batch["where"] * drawn[:, None])}
    exact = slopes(student, teacher)
    assert np.abs(exact).min() > 0.1
    np.testing.assert_allclose(along(gradient(weighed)), exact, rtol=2e-3, atol=1e-4)


@pytest.mark.slow
def test_minillms_gradient_over_drawn_answers_is_that_one_within_its_error():
    blocks, size = 32, 128
    student, teacher, made, gradient = minillm(size, 0.2, rollout_rows=blocks * size)
    found = []
    for step in range(1, blocks + 1):
        made.draw(student.params, step)
        found.append(along(gradient(next(made))) / size)
    mean, error = np.mean(found, axis=0), np.std(found, axis=0, ddof=1) / blocks**0.5
    exact = slopes(student, teacher)
    assert (np.abs(mean - exact) < 3 * error).all()
    assert np.abs(exact / error).max() > 10  # else anything would do
