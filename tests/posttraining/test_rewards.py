import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from distill_jax import models, parallel
from distill_jax.artifacts import InputError
from distill_jax.data import Rejects
from distill_jax.posttraining import (
    CHATML,
    VERIFIERS,
    Problem,
    RejectionConfig,
    by_program,
    by_reward,
    encode_chat,
    encode_prompt,
    end_of_turn,
    load_function,
    log_likelihood,
    read_problems,
    rewards,
)

PROBLEM = Problem(prompt="2 + 2?", answer="4", before=({"role": "system", "content": "Be short."},))


@pytest.mark.parametrize(
    ("name", "completion", "reference", "score"),
    [
        ("exact", " 4\n", "4", 1),
        ("exact", "4.", "4", 0),
        ("text", "The answer is four.", "Four", 1),
        ("text", "five", "Four", 0),
        ("number", "It is 4.0", "4", 1),
        ("number", "4 or 5", "4", 0),
        ("number", "none", "4", 0),
        ("regex", "so x = 17;", r"x\s*=\s*1\d\b", 1),
        ("regex", "so x = 7;", r"x\s*=\s*1\d\b", 0),
    ],
)
def test_verifiers_compare_with_the_reference(name, completion, reference, score):
    problem = Problem(prompt="", answer=reference)
    of = by_program(VERIFIERS[name])
    assert rewards.judge(name, of, [problem, problem], [completion, ""]) == [score, 0]


def test_a_function_is_given_conversations_completions_and_references():
    def reward(prompts, completions, references):
        assert prompts == [[*PROBLEM.before, {"role": "user", "content": "2 + 2?"}]] * 2
        assert (completions, references) == (["4", "5"], ["4", "4"])
        return np.array([1.5, -2.0], np.float32)

    assert rewards.judge("mine", by_reward(reward), [PROBLEM] * 2, ["4", "5"]) == [1.5, -2.0]


@pytest.mark.parametrize(
    ("scores", "complaint"),
    [
        ([1.0, math.nan], "reward mine: the score of '5' to '2 \\+ 2\\?' is nan"),
        ([math.inf, 0.0], "reward mine: the score of '4' to '2 \\+ 2\\?' is inf"),
        ([1.0], "reward mine: 1 scores of 2 answers"),
        (["good", 1.0], "reward mine: ValueError: could not convert"),
        (None, "reward mine: TypeError: "),
    ],
)
def test_what_is_no_score_is_refused_by_name(scores, complaint):
    with pytest.raises(InputError, match=complaint) as caught:
        rewards.judge("mine", lambda *_: scores, [PROBLEM] * 2, ["4", "5"])
    assert "\n" not in str(caught.value)


def test_a_function_comes_from_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "WEIGHT = 2\n"
        "def length(prompts, completions, references):\n"
        "    return [WEIGHT * len(completion) for completion in completions]\n"
    )
    of = by_reward(load_function(f"{path}:length"))
    assert rewards.judge("length", of, [PROBLEM], ["four"]) == [8]
    with pytest.raises(InputError, match=r"mine\.py: has no function 'width'"):
        load_function(f"{path}:width")
    with pytest.raises(InputError, match=r"mine\.py: has no function 'WEIGHT'"):
        load_function(f"{path}:WEIGHT")
    with pytest.raises(InputError, match=r"other\.py: no such file"):
        load_function(f"{tmp_path}/other.py:length")
    path.write_text("\n1 / 0\n")
    with pytest.raises(InputError, match=r"mine\.py: ZeroDivisionError: division .*py, line 2\)$"):
        load_function(f"{path}:length")
    path.write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(InputError, match=r"mine\.py: SystemExit: 3 "):
        load_function(f"{path}:length")


def test_an_error_of_a_reward_is_one_line_that_says_where():
    def broken(problems, completions):
        raise ValueError("a\n b")

    with pytest.raises(InputError, match=r"^reward mine: ValueError: a b \(.*py, line \d+\)$"):
        rewards.judge("mine", broken, [PROBLEM], ["4"])


@pytest.mark.slow
def test_log_likelihood_is_the_mean_over_the_answer_and_its_end(tokenizer, random_model):
    teacher = random_model(tokenizer.vocab_size)
    problems = [PROBLEM, Problem(prompt="Say a", answer=""), PROBLEM]
    completions = ["4", "a and then b", ""]
    of = by_reward(log_likelihood(teacher, tokenizer, rows_per_batch=2))
    scores = rewards.judge("teacher:t", of, problems, completions)
    for problem, completion, score in zip(problems, completions, scores, strict=True):
        messages = [*problem.before, {"role": "user", "content": problem.prompt}]
        prompt = encode_prompt(tokenizer, messages)
        answer = [*tokenizer.encode(completion), end_of_turn(tokenizer)]
        tokens = [*prompt, *answer, *[0] * 128][:128]  # behind, where attention ignores it
        logits = models.logits(teacher.config, teacher.params, jnp.asarray([tokens]))
        table = log_softmax(np.asarray(logits[0], np.float64), axis=-1)
        expected = [table[len(prompt) + i - 1, token] for i, token in enumerate(answer)]
        np.testing.assert_allclose(score, np.mean(expected), rtol=1e-5)


@pytest.mark.slow
def test_on_a_mesh_every_device_judges_answers_of_its_own(tokenizer, random_model, split):
    teacher, mesh = random_model(tokenizer.vocab_size), parallel.make_mesh()
    problems = [PROBLEM] * 11
    completions = ["4", "a and then b", "", *"12345678"]
    alone = by_reward(log_likelihood(teacher, tokenizer, rows_per_batch=2))
    judge = rewards.judge("teacher:t", alone, problems, completions)
    over = by_reward(log_likelihood(split(teacher, mesh), tokenizer, rows_per_batch=1, mesh=mesh))
    np.testing.assert_allclose(over(problems, completions), judge, rtol=1e-5)


def test_a_model_judges_the_tokens_that_a_template_makes_of_an_answer(tokenizer, random_model):
    template = CHATML.replace("message['content']", "(message['content'] | trim)")
    reward = rewards.by_model(
        random_model(tokenizer.vocab_size),
        lambda params, row, reading: jnp.sum(row["labels"] * row["where"], axis=-1),
        tokenizer,
        template,
        rows_per_batch=3,
    )
    prompt = [{"role": "user", "content": "2 + 2?"}]
    expected = [end_of_turn(tokenizer, template)]  # of an answer that is empty
    for text in (" 4\n", "5 or 6"):
        chat = encode_chat(tokenizer, [*prompt, {"role": "assistant", "content": text}], template)
        expected.append(int(np.dot(chat.tokens, chat.where)))
    assert reward([prompt] * 3, ["", " 4\n", "5 or 6"], [""] * 3) == expected


def conversation(*contents):
    roles = ("user", "assistant") * 3
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]}


def read(tokenizer, tmp_path, records, longest=100, **config):
    path = tmp_path / "asked.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    made = RejectionConfig(prompts=str(path), max_new_tokens=8, **config)
    return list(read_problems(tokenizer, made, longest, Rejects(made.bad_rows)))


def test_files_ask_what_their_conversations_end_with(tokenizer, tmp_path):
    records = [
        conversation("2 + 2?", "4"),
        conversation("2 + 2?", "4", "And 3 + 3?", "6"),
        conversation("2 + 2?", "4", "And 3 + 3?"),
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Add."},
        {"conversations": [{"from": "human", "value": "Hi"}], "system": "Be kind."},
    ]
    before = tuple(conversation("2 + 2?", "4")["messages"])
    assert read(tokenizer, tmp_path, records, reward="a.py:b") == [
        Problem(prompt="2 + 2?", answer="4"),
        Problem(prompt="And 3 + 3?", answer="6", before=before),
        Problem(prompt="And 3 + 3?", answer="", before=before),
        Problem(prompt="Add.\n\n1 and 2", answer="3"),
        Problem(prompt="Add.", answer=""),
        Problem(prompt="Hi", answer="", before=({"role": "system", "content": "Be kind."},)),
    ]


@pytest.mark.parametrize(
    ("record", "reward", "complaint"),
    [
        (conversation("a"), "exact", "no answer that the reward 'exact' could compare with"),
        (conversation("a", "four"), "number", "the answer 'four' is no number"),
        (conversation("a", "("), "regex", r"the answer '\(' is no regex"),
        (conversation("a " * 60), "a.py:b", r"a prompt of \d+ tokens, 8 more and the end .* in 80"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "a.py:b", "is not the user's"),
        ({"messages": [{"role": "system", "content": "a"}]}, "a.py:b", "is not the user's"),
        ({"text": "a"}, "a.py:b", "hold no conversation"),
        ({"instruction": "a", "output": 5}, "a.py:b", "output: not a text"),
    ],
)
def test_what_cannot_be_asked_or_judged_is_refused_with_its_line(
    tokenizer, tmp_path, record, reward, complaint
):
    good = conversation("a", "4")
    with pytest.raises(InputError, match=rf"asked\.jsonl: line 2: .*{complaint}") as caught:
        read(tokenizer, tmp_path, [good, record], longest=80, reward=reward)
    assert "\n" not in str(caught.value)
    records = [good, record, good]
    found = read(tokenizer, tmp_path, records, longest=80, reward=reward, bad_rows="skip")
    assert found == [Problem(prompt="a", answer="4")] * 2
