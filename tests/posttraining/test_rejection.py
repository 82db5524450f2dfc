import dataclasses
import functools
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from distill_jax import models, parallel
from distill_jax.artifacts import InputError
from distill_jax.models import decoding
from distill_jax.posttraining import (
    Problem,
    RejectionConfig,
    Task,
    accuracy,
    answers,
    choose,
    chosen_examples,
    encode_prompt,
    end_of_turn,
    read_samples,
    rejection,
    to_messages,
    write_samples,
)

PROBLEMS = tuple(Problem(prompt=f"Say {word}", answer=word) for word in ("a", "b", "c", "d", "e"))
CONFIG = RejectionConfig(samples=4, max_new_tokens=6, problems_per_batch=2, threshold=0.5)


def score(completion: str, problem: Problem) -> float:
    """Any text has some score, so that even a random model makes pairs."""
    return sum(map(ord, completion + problem.answer)) % 7 / 6


TASK = Task(name="echo", train=PROBLEMS, held_out=PROBLEMS, scorer=score)


def drawn(*scores: float, **changed) -> list[dict]:
    return [
        {"text": f"answer {index}", "finished": True, "score": score, **changed}
        for index, score in enumerate(scores)
    ]


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (drawn(0.0, 1.0, 0.5), ([1], 1, 0)),
        (drawn(0.5, 1.0, 0.0, 1.0, 0.0), ([1, 3], 1, 2)),
        (drawn(1.0, 1.0), ([0, 1], 0, None)),
        (drawn(0.9, 0.0), ([], None, None)),
        (drawn(1.0, 0.0, finished=False), ([], None, None)),
        (drawn(1.0, 0.0, text=" \n"), ([], None, None)),
        ([*drawn(0.0, text=""), *drawn(1.0, 0.5)], ([1], 1, 2)),
        ([*drawn(1.0), *drawn(0.0, text="b", finished=False)], ([0], 0, 1)),
        ([], ([], None, None)),
        # Several that are good enough: the best first, and each text once.
        (
            [*drawn(1.0, text="a"), *drawn(3.0, 0.0, text="b"), *drawn(1.0, text=" a ")],
            ([1, 0], 1, 0),
        ),
        # Of one text and two scores no pair is made.
        (drawn(2.0, 1.0, text="a"), ([0], 0, None)),
        ([*drawn(1.0, text="a"), *drawn(3.0, text="b", finished=False)], ([0], 0, None)),
    ],
)
def test_the_best_is_chosen_and_the_worst_rejected(samples, expected):
    assert choose(samples, threshold=1.0) == expected


def test_without_a_threshold_the_best_is_chosen_however_bad():
    assert choose(drawn(-7.5, -2.0, -9.0), threshold=None) == ([1, 0, 2], 1, 2)


def test_conversations_that_end_alike_have_seeds_of_their_own(tokenizer, monkeypatch):
    monkeypatch.setattr(rejection, "answer", fake_answer)
    turns = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"})
    asked = (PROBLEMS[0], dataclasses.replace(PROBLEMS[0], before=turns))
    records = rejection.sample(None, tokenizer, TASK, asked, CONFIG)
    seeds = [one["seed"] for record in records for one in record["samples"]]
    assert len(set(seeds)) == len(seeds) == 8


@pytest.mark.slow
def test_samples_are_what_the_model_draws_for_their_seed(tokenizer, random_model, tmp_path):
    model = random_model(tokenizer.vocab_size)
    figures = write_samples(tmp_path, model, tokenizer, TASK, PROBLEMS[:4], CONFIG)
    records = read_samples(tmp_path)
    assert [record["prompt"] for record in records] == [p.prompt for p in PROBLEMS[:4]]
    seeds = [one["seed"] for record in records for one in record["samples"]]
    assert len(set(seeds)) == len(seeds) == figures["samples"] == 16
    record, problem = records[3], PROBLEMS[3]
    (alone,) = models.generate(
        model,
        [encode_prompt(tokenizer, to_messages(problem))],
        max_new_tokens=6,
        sampling=models.Sampling(temperature=1.0),
        seeds=[record["samples"][2]["seed"]],
        stop_ids=(end_of_turn(tokenizer), tokenizer.eos_id),
    )
    one = record["samples"][2]
    assert alone.tokens[: len(one["tokens"])] == one["tokens"]
    assert one["text"] == tokenizer.decode(one["tokens"])
    assert one["score"] == score(one["text"], problem)
    kept, chosen, rejected = choose(record["samples"], 0.5)
    assert (record["kept"], record["chosen"], record["rejected"]) == (kept[:1], chosen, rejected)


@pytest.mark.slow
def test_eight_devices_share_the_answers_and_draw_those_of_one(
    tokenizer, random_model, split, monkeypatch
):
    model, mesh = random_model(tokenizer.vocab_size), parallel.make_mesh()
    spread, extend = [], decoding.extend

    def watched(setup, weights, rows, *arguments):
        key = rows.caches[0][0].key_RKCS
        spread.append((key.shape[0], key.sharding.shard_shape(key.shape)[0]))
        return extend(setup, weights, rows, *arguments)

    config = dataclasses.replace(CONFIG, rows_at_once=16)
    draw = functools.partial(rejection.sample, tokenizer=tokenizer, task=TASK, config=config)
    alone = draw(model, problems=PROBLEMS[:4])
    monkeypatch.setattr(decoding, "extend", watched)
    rows = parallel.batch_sharding(mesh)
    together = draw(split(model, mesh), problems=PROBLEMS[:4], sharding=rows)
    assert set(spread) == {(16, 2)}
    for expected, found in zip(alone, together, strict=True):
        for one, other in zip(expected.pop("samples"), found.pop("samples"), strict=True):
            assert other.pop("log_prob") == pytest.approx(one.pop("log_prob"), rel=1e-5)
            assert other == one
        assert found == expected


@pytest.mark.slow
def test_samples_of_a_problem_read_its_prompt_once(tokenizer, random_model, monkeypatch):
    read, prompts = decoding.read, []

    def counted(setup, params, prompts_UP, length_U):
        prompts.extend(length for length in np.asarray(length_U) if length)
        return read(setup, params, prompts_UP, length_U)

    monkeypatch.setattr(decoding, "read", counted)
    records = rejection.sample(
        random_model(tokenizer.vocab_size), tokenizer, TASK, PROBLEMS[:2], CONFIG
    )
    assert [len(record["samples"]) for record in records] == [4, 4]
    assert len(prompts) == 2


def test_chosen_answers_keep_their_tokens_and_learn_to_end(tokenizer):
    record = {
        "before": [],
        "prompt": "Say a",
        "answer": "a",
        "samples": [{"tokens": [301, 302]}, {"tokens": [300]}],
        "kept": [0],
    }
    (example,) = chosen_examples(tokenizer, [record, {**record, "kept": []}])
    first, second = chosen_examples(tokenizer, [{**record, "kept": [1, 0]}])
    assert (first.tokens[-2], second) == (300, example)
    prompt = encode_prompt(tokenizer, to_messages(PROBLEMS[0]))
    assert example.tokens == [*prompt, 301, 302, end_of_turn(tokenizer)]
    assert example.where == [False] * len(prompt) + [True] * 3


def fake_answer(model, tokenizer, problems, *, seeds, **_) -> list[answers.Answer]:
    """Answers that depend on the seed alone, quick enough to be killed many times."""
    return [answers.Answer(str(seed % 10), [seed % 300], -1.0, seed % 5 > 0) for seed in seeds]


def sample_in_a_process(directory: pathlib.Path, dies_at: int) -> int:
    """Runs `write_samples`, killed with SIGKILL at its `dies_at`-th write to disk."""
    program = f"""
import os, pathlib, signal, sys
sys.path[:0] = {[str(pathlib.Path(__file__).parent)]!r}
import test_rejection as this
from conftest import TEXTS
from distill_jax import artifacts, data
from distill_jax.posttraining import rejection
rejection.answer = this.fake_answer
tokenizer = data.train_tokenizer(TEXTS, 340, specials=("<|im_start|>", "<|im_end|>"))
write, left = artifacts.write_bytes, [{dies_at}]
def write_or_die(path, content):
    left[0] -= 1
    if left[0] == 0:
        (pathlib.Path(path).parent / f".{{pathlib.Path(path).name}}.tmp").write_bytes(content[:5])
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, content)
artifacts.write_bytes = write_or_die
rejection.write_samples({str(directory)!r}, None, tokenizer, this.TASK, this.PROBLEMS, this.CONFIG)
"""
    return subprocess.run([sys.executable, "-c", program], check=False).returncode


@pytest.mark.slow
def test_killed_at_any_write_and_run_again_it_ends_with_the_same_bytes(
    tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(rejection, "answer", fake_answer)
    write_samples(tmp_path / "calm", None, tokenizer, TASK, PROBLEMS, CONFIG)
    calm = {path.name: path.read_bytes() for path in (tmp_path / "calm").iterdir()}
    assert sorted(calm) == ["samples.jsonl", "sampling.json"]
    for dies_at in (4, 5):  # in the last batch, in samples.jsonl
        place = tmp_path / str(dies_at)
        assert sample_in_a_process(place, dies_at) == -signal.SIGKILL
        write_samples(place, None, tokenizer, TASK, PROBLEMS, CONFIG)
        assert {path.name: path.read_bytes() for path in place.iterdir()} == calm


def test_finished_batches_are_not_drawn_again(tokenizer, tmp_path, monkeypatch):
    asked = []

    def breaks(model, tokenizer, problems, **rest):
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.extend(sorted({problem.prompt for problem in problems}))
        return fake_answer(model, tokenizer, problems, **rest)

    monkeypatch.setattr(rejection, "answer", breaks)
    with pytest.raises(KeyboardInterrupt):
        write_samples(tmp_path, None, tokenizer, TASK, PROBLEMS, CONFIG)
    asked.pop()
    write_samples(tmp_path, None, tokenizer, TASK, PROBLEMS, CONFIG)
    assert asked == ["Say a", "Say b", "Say c", "Say e"]


def test_samples_of_other_settings_are_refused_and_stay(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(rejection, "answer", fake_answer)
    write_samples(tmp_path, None, tokenizer, TASK, PROBLEMS, CONFIG)
    before = (tmp_path / "samples.jsonl").read_bytes()
    other = RejectionConfig(samples=4, max_new_tokens=6, problems_per_batch=2, threshold=1.0)
    with pytest.raises(InputError, match=r"other settings \(config.threshold: 0.5 -> 1.0\)"):
        write_samples(tmp_path, None, tokenizer, TASK, PROBLEMS, other)
    assert (tmp_path / "samples.jsonl").read_bytes() == before
    # How many are written at the same time is none of them.
    write_samples(
        tmp_path, None, tokenizer, TASK, PROBLEMS, dataclasses.replace(CONFIG, rows_at_once=4)
    )


def test_damaged_or_missing_samples_are_named(tmp_path):
    with pytest.raises(InputError, match=r"samples\.jsonl: no such file"):
        read_samples(tmp_path)
    (tmp_path / "samples.jsonl").write_text('{"a": 1}\n{"a"')
    with pytest.raises(InputError, match="line 2: not JSON"):
        read_samples(tmp_path)


@pytest.mark.parametrize("rows_per_batch", [2, 16])
def test_accuracy_is_the_mean_score(tokenizer, monkeypatch, rows_per_batch):
    said = dict(zip(PROBLEMS, ["a", "a", "c", "c", "e"], strict=True))

    rows = parallel.batch_sharding(parallel.make_mesh())

    def answer(model, tokenizer, problems, *, sampling, sharding, **_):
        assert (sampling.temperature, sharding) == (0, rows)
        return [answers.Answer(said[p], [1], 0.0, said[p] != "e") for p in problems]

    monkeypatch.setattr(answers, "answer", answer)
    task = Task(
        name="echo",
        train=(),
        held_out=PROBLEMS,
        scorer=lambda completion, problem: float(completion == problem.answer),
    )
    figures = accuracy(None, tokenizer, task, rows_per_batch=rows_per_batch, sharding=rows)
    assert figures == {"accuracy": 3 / 5, "finished": 4 / 5, "problems": 5}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("samples", 0),
        ("rows_at_once", 0),
        ("temperature", 0.0),
        ("top_p", 1.5),
        ("top_p", 0.0),
        ("reward", "nonsense"),
        ("keep", "none"),
    ],
)
def test_a_config_that_cannot_sample_is_refused(field, value):
    with pytest.raises(InputError, match=rf"{field} is '?{value}"):
        RejectionConfig(**{field: value})


def test_a_reward_may_take_the_place_of_the_task(tokenizer, monkeypatch):
    monkeypatch.setattr(rejection, "answer", fake_answer)
    config = RejectionConfig(samples=4, keep="all", threshold=3.0)

    def judge(problems, completions):
        assert [problem.prompt for problem in problems] == ["Say a"] * 4 + ["Say b"] * 4
        return list(map(float, completions))

    for record in rejection.sample(None, tokenizer, TASK, PROBLEMS[:2], config, judge):
        scores = [float(one["text"]) for one in record["samples"]]
        assert [one["score"] for one in record["samples"]] == scores
        good = {one["text"] for one in record["samples"] if one["finished"] and one["score"] >= 3}
        kept = [record["samples"][index]["text"] for index in record["kept"]]
        assert kept == sorted(good, key=float, reverse=True)
    with pytest.raises(InputError, match=r"reward task: the score of '\d' to 'Say a' is nan"):
        rejection.sample(
            None, tokenizer, TASK, PROBLEMS[:1], config, lambda *_: [1.0, float("nan"), 0, 0]
        )


def test_a_threshold_that_no_log_probability_reaches_is_refused():
    RejectionConfig(reward="teacher:large", threshold=None)
    with pytest.raises(InputError, match=r"threshold is 1\.0, but a reward model's scores are"):
        RejectionConfig(reward="reward_model")
    with pytest.raises(InputError, match=r"threshold is 1\.0, and no log-probability is above 0"):
        RejectionConfig(reward="teacher:large")
