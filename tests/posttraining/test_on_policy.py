"""What on-policy distillation learns from, and its loss and its run."""

import json
import math

import jax
import numpy as np
import pytest
import scipy.special
from etils import epath
from on_policy_parts import (
    END,
    GIVEN,
    LARGE,
    ONE,
    PROMPTS,
    TOKENIZER,
    Parts,
    model_of,
    setting,
    steps,
)
from pruning import numpy_llama

from distill_jax import models, parallel
from distill_jax.artifacts import InputError
from distill_jax.models import Completion
from distill_jax.posttraining import Example, OnPolicyConfig, Rollouts, on_policy_loss, rollouts
from distill_jax.training import read_metrics


@pytest.fixture(autouse=True)
def stops(monkeypatch):
    monkeypatch.setattr(rollouts, "stop_ids", lambda *_: (END,))


def of_rows(model, batch):
    """log p of all tokens of the vocabulary, of a batch's tokens that are learnt, in float64."""
    logits = numpy_llama.logits(
        model.config, model.params, batch["tokens"], batch["segment_ids"], tied=False
    )
    return scipy.special.log_softmax(logits[batch["where"] > 0], axis=-1)


def cross_entropy(model, batch):
    found, labels = of_rows(model, batch), batch["labels"][batch["where"] > 0]
    return -found[np.arange(len(labels)), labels].mean()


@pytest.mark.slow
@pytest.mark.parametrize("student_share", [1.0, 0.0])
def test_gkd_is_its_definition_on_own_answers_and_on_given_ones(student_share):
    beta, temperature = 0.3, 1.7
    config = setting(
        student_share=student_share,
        options={"beta": beta},
        divergence_temperature=temperature,
        conversations_weight=0.5,
        text_weight=0.25,
    )
    parts = Parts(config, steps(1))
    figures = parts.rollouts.draw(parts.student.params, 1)
    batch = next(parts.rollouts)
    assert figures["student_sampled"] == student_share
    assert figures["answer_length"] == batch["where"].sum() / 8
    if not student_share:
        rows = {tuple(row["tokens"][row["segment_ids"] == 1]) for row in unstack(batch)}
        assert rows == {tuple(example.tokens) for example in GIVEN}
    frozen = {"teacher": parts.teacher.params}
    loss, terms = jax.jit(parts.loss_fn)(parts.student.params, batch, 0, frozen).mean()
    logs = {name: of_rows(getattr(parts, name), batch) for name in ("student", "teacher")}
    soft = [
        scipy.special.softmax(logs[name] / temperature, axis=-1) for name in ("student", "teacher")
    ]
    middle = (1 - beta) * soft[0] + beta * soft[1]
    kl = [np.sum(one * np.log(one / middle), axis=-1).mean() for one in soft]
    divergence = temperature**2 * ((1 - beta) * kl[0] + beta * kl[1])
    q = np.exp(logs["student"])
    labels = batch["labels"][batch["where"]]
    beside = {name: cross_entropy(parts.student, batch[name]) for name in ("conversations", "text")}
    expected = beside | {
        "gkd": divergence,
        "reverse_kl": np.sum(q * (logs["student"] - logs["teacher"]), axis=-1).mean(),
        "entropy": -np.sum(q * logs["student"], axis=-1).mean(),
        "teacher_log_prob": logs["teacher"][np.arange(len(labels)), labels].mean(),
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-4, err_msg=name)
    total = divergence + 0.5 * beside["conversations"] + 0.25 * beside["text"]
    np.testing.assert_allclose(loss, total, rtol=1e-4)


def unstack(batch):
    return [{name: batch[name][i] for name in rollouts.ROW} for i in range(len(batch["tokens"]))]


def test_a_batch_holds_what_the_student_says_to_the_prompts():
    parts = Parts(setting(seed=5), steps(1))
    parts.rollouts.draw(parts.student.params, 1)
    rows = unstack(next(parts.rollouts))
    said = []
    for row in rows:
        learnt = np.flatnonzero(row["where"])
        tokens = row["tokens"][row["segment_ids"] == 1].tolist()
        prompt, answer = tokens[: learnt[0] + 1], tokens[learnt[0] + 1 :]
        assert learnt.tolist() == list(range(len(prompt) - 1, len(tokens) - 1))
        assert row["labels"][learnt].tolist() == answer
        assert answer[-1] == END or len(answer) == 8
        said.append((prompt, answer))
    assert {tuple(prompt) for prompt, _ in said} == set(map(tuple, PROMPTS))
    # Eight rows of five prompts: those that stand there twice are answered otherwise.
    assert len({json.dumps(one) for one in said}) > 5


@pytest.fixture
def made_up(monkeypatch):
    """Answers that no model wrote, each time others."""
    source = np.random.default_rng(4)

    def generate(model, prompts, **_):
        drawn = source.integers(3, LARGE, (len(prompts), 4)).tolist()
        return [Completion(answer, [], False) for answer in drawn]

    monkeypatch.setattr(rollouts, "generate", generate)


def test_the_part_of_own_rounds_is_that_of_the_recipe(made_up):
    parts = Parts(setting(student_share=0.3), steps(1))
    own = [parts.rollouts.draw({}, step)["student_sampled"] for step in range(1, 401)]
    # Three standard errors.
    assert abs(np.mean(own) - 0.3) < 3 * (0.3 * 0.7 / 400) ** 0.5


MINILLM = {"method": "minillm", "rollout_rows": 16, "epochs": 2, "text_weight": 0.5}


def test_every_answer_of_a_round_is_learnt_once_an_epoch(made_up):
    parts = Parts(setting(rollout_rows=16, epochs=2), steps(8))
    seen = []
    for step in range(1, 9):
        parts.rollouts.draw(parts.student.params, step)
        seen.append([tuple(row["tokens"]) for row in unstack(next(parts.rollouts))])
    rounds = [[sorted(seen[i] + seen[i + 1]) for i in (first, first + 2)] for first in (0, 4)]
    for first, second in rounds:
        assert first == second
    assert rounds[0] != rounds[1]
    assert seen[0] != seen[2]


@pytest.mark.slow
def test_answers_are_drawn_by_the_parameters_of_their_own_step(tmp_path):
    """Those after one step are known from a run that ends there."""
    config = setting(divergence="reverse_kl")
    after_one = Parts(config, steps(1)).train(tmp_path / "one")
    two = Parts(config, steps(2), directory=tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        asked = []
        generate = rollouts.generate
        patch.setattr(
            rollouts, "generate", lambda *a, **k: asked.append((a, k)) or generate(*a, **k)
        )
        two.train(tmp_path / "two")
    assert len(asked) == 2
    (_, prompts), options = asked[1]
    by_step = [
        [answer.tokens for answer in models.generate(one, prompts, **options)]
        for one in (two.student, after_one)
    ]
    assert by_step[0] != by_step[1]
    shown = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in shown] == [2] * 8
    assert [line["answer"] for line in shown] == list(map(TOKENIZER.decode, by_step[1]))


class Killed(Exception):
    """Stands for the end of the process."""


class Dying(Rollouts):
    """As seen by a process that is killed before a batch."""

    def __next__(self):
        if self._step == self.last:
            raise Killed
        return super().__next__()


def ended(directory, last=None):
    """A run of rounds of four steps with checkpoints after every five, killed at a step."""
    directory.mkdir(exist_ok=True)
    train = steps(16, checkpoint_every=5)
    parts = Parts(setting(**MINILLM), train, directory=epath.Path(directory), kind=Dying)
    parts.rollouts.last = last
    return parts.train(directory)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run: its directory, and the model."""
    place = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollouts, "stop_ids", lambda *_: (END,))
        return place, ended(place)


@pytest.mark.slow
def test_a_run_that_was_killed_in_a_round_ends_with_the_same_bits(whole, tmp_path):
    for last in (7, 11):
        with pytest.raises(Killed):
            ended(tmp_path, last)
    place, model = whole
    jax.tree.map(np.testing.assert_array_equal, model.params, ended(tmp_path).params)
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / file).read_text() == (place / file).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gkd", "minillm"])
def test_the_student_comes_nearer_to_the_teacher_on_what_it_writes(method, whole, tmp_path):
    place, name = whole[0], "minillm/single_step"
    if method == "gkd":
        place, name = tmp_path, "reverse_kl"
        Parts(setting(divergence="reverse_kl"), steps(16)).train(place)
    lines = read_metrics(place / "metrics.jsonl")
    assert len(lines) == 16
    kl = [line[name] for line in lines]
    assert np.mean(kl[-3:]) < 0.85 * np.mean(kl[:3])


def test_a_round_that_has_ended_leaves_nothing_in_a_checkpoint(made_up):
    parts = Parts(setting(rollout_rows=16, epochs=2), steps(8))
    kept = []
    for step in range(1, 6):
        parts.rollouts.draw(parts.student.params, step)
        kept.append(parts.rollouts.get_state()["samples"] is not None)
    assert kept == [True, True, True, False, True]


@pytest.mark.slow
def test_eight_devices_write_and_learn_what_one_does(tmp_path):
    """Rows over four or, in the step, over two and their times over two; heads over two."""
    config = setting(**MINILLM, sequence_length=16)
    eight = parallel.make_mesh(parallel.MeshConfig(data=2, sequence=2, tensor=2))
    for name, mesh in (("one", ONE), ("eight", eight)):
        place = epath.Path(tmp_path / name)
        place.mkdir()
        Parts(config, steps(2), mesh=mesh, directory=place).train(place)
    one, eight = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "eight"))
    for left, right in zip(one, eight, strict=True):
        assert left.keys() == right.keys()
        for name, value in left.items():
            assert right[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    shown = [(tmp_path / name / "samples.jsonl").read_text() for name in ("one", "eight")]
    answers = [[json.loads(line)["answer"] for line in text.splitlines()] for text in shown]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ppo"}, "method is 'ppo'; choose one of gkd, minillm"),
        ({"divergence": "kl"}, "OnPolicyConfig.divergence: 'kl' is none of"),
        ({"student_share": 1.5}, r"student_share is 1.5; it must be in \[0, 1\]"),
        ({"student_share": float("nan")}, r"student_share is nan; it must be in \[0, 1\]"),
        ({"teacher_share": 1.0}, r"teacher_share is 1.0; it must be in \[0, 1\)"),
        ({"method": "minillm", "temperature": 0.7}, "temperature is 0.7; MiniLLM's gradient"),
        ({"method": "minillm", "top_p": 1.0}, "top_p is 1.0; MiniLLM's gradient"),
        ({"temperature": 0.0}, "OnPolicyConfig.temperature is 0.0; above 0"),
        ({"epochs": 0}, "epochs is 0; at least 1"),
        ({"rollout_rows": 0}, "rollout_rows is 0; at least 1"),
        ({"sequence_length": 32}, "sequence_length is 32; answers alone may have 32 tokens"),
        ({"text_weight": -1.0}, "text_weight is -1.0; it must be a number and not negative"),
        ({"text_weight": math.inf}, "text_weight is inf; it must be a number"),
        ({"clip": 0.0}, "clip is 0.0; it must be above 0"),
        ({"max_new_tokens": 0}, "OnPolicyConfig.max_new_tokens is 0; at least 1"),
    ],
)
def test_a_wrong_setting_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        OnPolicyConfig(**options)


@pytest.mark.parametrize(
    ("options", "sources", "message"),
    [
        ({"rollout_rows": 12}, {}, "rollout_rows is 12; it must be a multiple .* rows, 8"),
        ({"max_new_tokens": 12}, {}, "is 14; the longest prompt and its answer have 17 tokens"),
        ({"sequence_length": 13}, {"long": True}, "is 13; the longest conversation has 14 tokens"),
        ({}, {"prompts": []}, "OnPolicyConfig.prompts: there are none"),
        ({"student_share": 0.5}, {"conversations": []}, "no conversations to learn"),
        ({"text_weight": 1.0}, {}, "text_weight: there is no text to learn"),
        ({"text_weight": 1.0}, {"text": []}, "text_weight: there is no text to learn"),
    ],
)
def test_sources_that_do_not_fit_are_refused(options, sources, message):
    given = {"prompts": PROMPTS, "conversations": GIVEN} | sources
    if given.pop("long", False):
        given["conversations"] = [Example([1] * 14, [True] * 14)]
    with pytest.raises(InputError, match=message):
        Rollouts(
            model_of(0, LARGE).config, model_of(1, LARGE), TOKENIZER, setting(**options),
            steps(1), mesh=ONE, **given,
        )  # fmt: skip


def test_text_with_nothing_to_learn_weighs_nothing():
    made = Parts(setting(text_weight=1.0), steps(1))
    row = {"tokens": np.ones(8, np.int32), "segment_ids": np.arange(8, dtype=np.int32)}
    made.rollouts._sources["text"] = [row]
    made.rollouts.draw(made.student.params, 1)
    assert not next(made.rollouts)["text"]["where"].any()


def test_a_teacher_of_another_vocabulary_is_refused():
    with pytest.raises(InputError, match="teacher: has 3 token ids, the student 19"):
        on_policy_loss(model_of(0, LARGE).config, model_of(1, 3).config, setting())


def test_prompts_come_over_and_over_each_time_in_another_order():
    made = Parts(setting(), steps(1)).rollouts
    asked = [prompt for number in range(5) for prompt in made._prompts(number)]
    laps = [asked[first : first + 5] for first in range(0, 40, 5)]
    assert [sorted(lap) for lap in laps] == [sorted(PROMPTS)] * 8
    assert len(set(map(str, laps))) > 4
