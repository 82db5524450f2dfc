import pytest

from distill_jax.artifacts import InputError
from distill_jax.posttraining import TASKS, Problem, load_task, tasks

CAPITALS = {
    "Paris": [
        ("Paris", 1),
        ("paris.", 1),
        ("  **Paris**\nIt lies on the Seine.", 1),
        ("The capital of France is Paris.", 1),
        ("The capital of France is Paris. It lies on the Seine.", 1),
        ("Paris, France", 1),
        ("Paris, London, Rome", 0),
        ("It is in Paris.", 1),
        ("It is not Paris.", 0),
        ("Lyon\nParis", 0),
        ("Parisian", 0),
        ("", 0),
        (".", 0),
    ],
    "Sao Tome": [("São Tomé", 1), ("SÃO TOMÉ!", 1), ("Sao", 0)],
    "St. John's": [("St. John's", 1), ("St John’s.", 1), ("It is St. John's. Yes.", 1), ("St.", 0)],
    "The Hague": [("Hague", 1), ("the hague", 1), ("A Hague", 1)],
    "Washington": [("Washington, D.C.", 1), ("Washington DC", 1), ("Washington State", 0)],
    "Port-au-Prince": [("Port au Prince", 1), ("Port", 0)],
}
ALSO = {"Paris": ("Paris, France",), "Washington": ("Washington, D.C.",)}


@pytest.mark.parametrize(
    ("answer", "completion", "score"),
    [(answer, *case) for answer, cases in CAPITALS.items() for case in cases],
)
def test_names_are_compared_without_case_accents_and_articles(answer, completion, score):
    problem = Problem(prompt="?", answer=answer, also=ALSO.get(answer, ()))
    assert tasks.score_text(completion, problem) == score


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("12", 1),
        ("12.", 1),
        ("7 + 5 = 12", 1),
        ("7 + 5 is 12.\n13", 1),
        ("The answer is **12**!", 1),
        ("12.0", 1),
        ("112", 0),
        ("12.5", 0),
        ("-12", 0),
        ("12 or 13", 0),
        ("twelve", 0),
        ("", 0),
        ("\n", 0),
    ],
)
def test_the_last_number_of_the_first_line_is_the_answer(completion, score):
    assert tasks.score_number(completion, Problem(prompt="7 + 5?", answer="12")) == score


@pytest.mark.parametrize("name", sorted(TASKS))
def test_each_problem_stands_on_one_side_and_its_answers_are_right(name):
    task = load_task(name)
    problems = (*task.train, *task.held_out)
    assert len({problem.prompt for problem in problems}) == len(problems) > 100
    assert 0.1 < len(task.held_out) / len(problems) < 0.3
    for problem in problems:
        for answer in (problem.answer, *problem.also):
            assert task.score(answer, problem) == 1
            assert task.score(f"The answer is {answer}.", problem) == 1
        assert task.score("I do not know.", problem) == 0


def test_a_larger_held_out_share_only_adds_problems():
    small, large = load_task("sums", held_out=0.1), load_task("sums", held_out=0.5)
    assert set(small.held_out) < set(large.held_out)


def test_what_is_asked():
    problems = {p.prompt: p for name in TASKS for p in _all(name)}
    assert problems["What is the capital of France?"].answer == "Paris"
    assert problems["What is the capital of the United States?"].answer == "Washington"
    assert problems["On which continent is the Netherlands?"].answer == "Europe"
    assert problems["What is 20 + 0?"].answer == "20"
    assert "What is 20 + 1?" not in problems
    assert problems["Which is larger, 9 or 12?"].answer == "12"


def _all(name: str) -> tuple[Problem, ...]:
    task = load_task(name)
    return (*task.train, *task.held_out)


def test_an_unknown_task_and_a_bad_share_are_refused():
    with pytest.raises(InputError, match="task 'riddles': unknown; there are capitals, "):
        load_task("riddles")
    with pytest.raises(InputError, match=r"held_out: 1\.0 is not between 0 and 1"):
        load_task("sums", held_out=1.0)
