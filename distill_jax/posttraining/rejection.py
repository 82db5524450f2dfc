"""Rejection sampling: many answers to each question, of which a reward keeps the best.

The Llama 3 paper, 4.2.2, draws 10 to 30 answers and lets a reward model pick one; here a program
or a function may, too. The best of each question, or all that are good enough, feed fine-tuning;
the best and the worst make a pair for preference optimisation.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from etils import epath
from jax.sharding import Sharding

from distill_jax import artifacts, parallel, progress
from distill_jax.artifacts import InputError, check_choices
from distill_jax.data import Tokenizer, read_records
from distill_jax.models import Model
from distill_jax.posttraining.answers import answer, seed_of
from distill_jax.posttraining.chat import Example, chat_template, encode_prompt, end_of_turn
from distill_jax.posttraining.prompts import PromptConfig
from distill_jax.posttraining.rewards import VERIFIERS, Judge, by_program, judge
from distill_jax.posttraining.tasks import TASK, Problem, Task, to_messages

Keep = Literal["best", "all"]

REWARD_MODEL = "reward_model"
"""Stands for the recipe's reward model as `RejectionConfig.reward`."""
_SETTINGS, _SAMPLES = "sampling.json", "samples.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RejectionConfig(PromptConfig):
    """What is asked and how answers are drawn, see `PromptConfig`, and when one is good enough.

    Attributes:
      reward: what scores an answer: "task", the task's own program; "exact", "text", "number" and
        "regex" compare it with the reference (`posttraining.VERIFIERS`); "reward_model" is the
        recipe's; "teacher:NAME" is the mean log-probability of its tokens under a teacher of the
        recipe; "path/to/file.py:function" is any function (prompts, completions, references) ->
        scores, see `posttraining.Reward`.
      samples: answers drawn for each problem, K.
      threshold: the score from which an answer may be chosen; None: any may.
      keep: what is learnt of the answers to a question: the "best", or "all" that may be chosen,
        each text once.
      problems_per_batch: problems answered at a time, and committed to disk at a time. Rows stand
        idle at its end, so times `samples` it is best several times `rows_at_once`.
      rows_at_once: most answers that are written at the same time, by all devices together, which
        bounds the memory of the cache; each device has one at least.
    """

    reward: str = TASK
    samples: int = 10
    threshold: float | None = 1.0
    keep: Keep = "best"
    problems_per_batch: int = 8
    rows_at_once: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, {"keep": Keep})
        known = (TASK, REWARD_MODEL, *VERIFIERS)
        if self.reward not in known and ":" not in self.reward:
            raise InputError(
                f"RejectionConfig.reward is {self.reward!r}; it is one of {', '.join(known)}, "
                "teacher:NAME, or FILE.py:FUNCTION"
            )
        if self.reward == REWARD_MODEL and self.threshold is not None:
            raise InputError(
                f"RejectionConfig.threshold is {self.threshold}, but a reward model's scores are "
                "known but for a constant; None lets the best answer be chosen"
            )
        if self.teacher is not None and self.threshold is not None and self.threshold > 0:
            raise InputError(
                f"RejectionConfig.threshold is {self.threshold}, and no log-probability is above "
                "0; None lets the best answer be chosen"
            )
        for name in ("samples", "problems_per_batch", "rows_at_once"):
            if getattr(self, name) < 1:
                raise InputError(f"RejectionConfig.{name} is {getattr(self, name)}; at least 1")

    @property
    def verifier(self) -> str | None:
        """The reward, if it compares with references."""
        return self.reward if self.reward in VERIFIERS else None

    @property
    def teacher(self) -> str | None:
        """The teacher whose log-probabilities are the reward."""
        kind, _, name = self.reward.partition(":")
        return name if kind == "teacher" else None

    @property
    def function(self) -> str | None:
        """The file and function that are the reward."""
        return self.reward if ":" in self.reward and self.teacher is None else None


def sample(
    model: Model,
    tokenizer: Tokenizer,
    task: Task,
    problems: Sequence[Problem],
    config: RejectionConfig,
    reward: Judge | None = None,
    sharding: Sharding | None = None,
) -> list[dict[str, Any]]:
    """Draws and scores `config.samples` answers to each problem, whose prompt is read once.

    Args:
      model: answers.
      tokenizer: the model's.
      task: names the problems, and scores the answers if nothing else does.
      problems: the questions.
      config: how answers are drawn.
      reward: what scores the answers in place of the task's program.
      sharding: how the answers are spread over devices, see `models.generate`.

    Returns:
      One JSON object a problem: "task", "before", "prompt", "answer"; "samples", each with "text",
      "tokens" (without the end of the turn), "score", "finished", "log_prob" and "seed"; "kept",
      "chosen" and "rejected", indices of samples as `choose` picks them, or None.

    Raises:
      InputError: a score is not a finite number.
    """
    repeated = [problem for problem in problems for _ in range(config.samples)]
    seeds = [
        seed_of(config.seed, task.name, *_before(problem), problem.prompt, index)
        for problem in problems
        for index in range(config.samples)
    ]
    answers = answer(
        model,
        tokenizer,
        repeated,
        sampling=config.sampling,
        seeds=seeds,
        max_new_tokens=config.max_new_tokens,
        template=config.template,
        batch_rows=config.rows_at_once,
        sharding=sharding,
    )
    texts = [said.text for said in answers]
    scores = judge(config.reward, reward or by_program(task.scorer), repeated, texts)
    samples = [
        {**said._asdict(), "score": score, "seed": seed}
        for said, score, seed in zip(answers, scores, seeds, strict=True)
    ]
    records = []
    for index, problem in enumerate(problems):
        drawn = samples[index * config.samples : (index + 1) * config.samples]
        choice = choose(drawn, config.threshold)
        records.append(
            {
                "task": task.name,
                "before": list(problem.before),
                "prompt": problem.prompt,
                "answer": problem.answer,
                "samples": drawn,
                **choice._asdict(),
                "kept": choice.kept if config.keep == "all" else choice.kept[:1],
            }
        )
    return records


def _before(problem: Problem) -> list[str]:
    """What tells apart conversations that end in the same question."""
    return [artifacts.fingerprint(list(problem.before))] if problem.before else []


class Choice(NamedTuple):
    """Indices of the samples of a problem.

    Attributes:
      kept: those that are good enough, the best first, each text once.
      chosen: the best of them, or None.
      rejected: the worst of all that say something else, if it is worse than the chosen, or None.
    """

    kept: list[int]
    chosen: int | None
    rejected: int | None


def choose(samples: Sequence[dict[str, Any]], threshold: float | None) -> Choice:
    """The samples that are good enough, and the worst one beside them.

    Good enough is one with a score of at least `threshold`, if there is one, that ended its turn
    itself. The worst has the lowest score. An empty text is neither, and of equals the first is
    taken, so that a text drawn twice counts once.
    """
    said = [index for index, drawn in enumerate(samples) if drawn["text"].strip()]
    good = [
        index
        for index in said
        if samples[index]["finished"]
        and (threshold is None or samples[index]["score"] >= threshold)
    ]
    if not good:
        return Choice([], None, None)
    texts: dict[str, int] = {}
    for index in sorted(good, key=lambda index: (-samples[index]["score"], index)):
        texts.setdefault(samples[index]["text"].strip(), index)
    kept = list(texts.values())
    best = samples[kept[0]]
    # A judge may score one text twice, and not alike.
    worse = [
        index
        for index in said
        if samples[index]["score"] < best["score"]
        and samples[index]["text"].strip() != best["text"].strip()
    ]
    worst = min(worse, key=lambda index: samples[index]["score"], default=None)
    return Choice(kept, kept[0], worst)


def write_samples(
    directory: str | os.PathLike[str],
    model: Model,
    tokenizer: Tokenizer,
    task: Task,
    problems: Sequence[Problem],
    config: RejectionConfig,
    reward: Judge | None = None,
    sharding: Sharding | None = None,
) -> dict[str, float]:
    """`sample` over all problems, into `directory`/samples.jsonl; returns its figures.

    Each batch of problems is committed as a file of its own, so that a later call goes on where
    an earlier one was killed and ends with the same bytes, if the reward gives the same scores and
    XLA rounds alike, which needs as many rows and devices. Of several processes all draw, and the
    first writes.

    Raises:
      InputError: the directory holds samples of other problems or settings, or a score is not a
        finite number.
      Preempted: the job was told to stop (`parallel.stoppable`).
    """
    place = epath.Path(directory)
    size = config.problems_per_batch
    batches = [problems[start : start + size] for start in range(0, len(problems), size)]
    parts = [place / f"part-{index:05}.jsonl" for index in range(len(batches))]

    def begin() -> list[int]:
        """The batches that are not on disk yet."""
        place.mkdir(parents=True, exist_ok=True)
        _claim(place, tokenizer, task, problems, config)
        whole = (place / _SAMPLES).exists()
        return [i for i, part in enumerate(parts) if not whole and not part.exists()]

    def end() -> None:
        if not (place / _SAMPLES).exists():
            artifacts.write_bytes(place / _SAMPLES, b"".join(part.read_bytes() for part in parts))
        for part in place.glob("part-*.jsonl"):
            part.unlink()

    missing = parallel.on_main(begin, what="the first sample")
    todo = [(parts[index], batches[index]) for index in missing]
    draw = functools.partial(
        sample, model, tokenizer, task, config=config, reward=reward, sharding=sharding
    )
    _write_parts(todo, draw, task.name, len(problems))
    parallel.on_main(end, what="the last sample")
    return _figures(read_samples(place))


def _write_parts(
    todo: Sequence[tuple[epath.Path, Sequence[Problem]]],
    draw: Callable[[Sequence[Problem]], list[dict[str, Any]]],
    name: str,
    count: int,
) -> None:
    """Draws the batches of problems, of `count` in all, that are not on disk yet."""
    done = count - sum(len(batch) for _, batch in todo)
    with progress.bar(f"sample {name}", count, unit="problems", done=done) as bar:
        for part, batch in todo:
            parallel.stop_if_preempted("while answers were sampled")
            records = draw(batch)
            lines = "".join(json.dumps(record, sort_keys=True) + "\n" for record in records)
            if parallel.is_main():
                artifacts.write_bytes(part, lines.encode())
            solved = sum(record["chosen"] is not None for record in records)
            tokens = sum(len(drawn["tokens"]) for r in records for drawn in r["samples"])
            bar.advance(len(batch), tokens=tokens, note=f"{solved}/{len(batch)} solved")


def read_samples(directory: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records that `write_samples` left, in the order of the problems.

    Raises:
      InputError: there are none, or a line is damaged.
    """
    return [dict(record) for _, record in read_records(epath.Path(directory) / _SAMPLES)]


def chosen_examples(
    tokenizer: Tokenizer, records: Sequence[dict[str, Any]], template: str | None = None
) -> list[Example]:
    """The answers to each problem that were kept, as data for `sft_rows`.

    The tokens are those the model drew, not a second tokenisation of its text; the token that
    ends the turn is learnt with them.
    """
    end = end_of_turn(tokenizer, template)
    examples = []
    for record in records:
        prompt = encode_record(tokenizer, record, template)
        for index in record["kept"]:
            tokens = [*record["samples"][index]["tokens"], end]
            where = [False] * len(prompt) + [True] * len(tokens)
            examples.append(Example([*prompt, *tokens], where))
    return examples


def encode_record(
    tokenizer: Tokenizer, record: dict[str, Any], template: str | None = None
) -> list[int]:
    """The tokens of a record's prompt, as the model saw it when it answered."""
    before = tuple(record["before"])
    problem = Problem(prompt=record["prompt"], answer=record["answer"], before=before)
    return encode_prompt(tokenizer, to_messages(problem), template)


def _claim(
    place: epath.Path,
    tokenizer: Tokenizer,
    task: Task,
    problems: Sequence[Problem],
    config: RejectionConfig,
) -> None:
    """Writes down what the directory is for, or refuses one that is for something else."""
    asked = dataclasses.asdict(config)
    del asked["rows_at_once"]  # says how, not what
    settings = {
        "config": asked,
        "task": task.name,
        "problems": artifacts.fingerprint([dataclasses.asdict(problem) for problem in problems]),
        "template": artifacts.fingerprint(chat_template(tokenizer, config.template)),
        "tokenizer": tokenizer.fingerprint,
    }
    path = place / _SETTINGS
    if not path.exists():
        artifacts.write_json(path, settings)
    elif differences := artifacts.diff(artifacts.read_json(path), settings):
        raise InputError(f"{path}: samples of other settings ({'; '.join(differences)})")


def _figures(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What a person wants to know of the samples at a glance."""
    drawn = [one for record in records for one in record["samples"]]
    return {
        "problems": len(records),
        "samples": len(drawn),
        "mean_score": sum(one["score"] for one in drawn) / max(len(drawn), 1),
        "finished": sum(one["finished"] for one in drawn) / max(len(drawn), 1),
        "solved": sum(record["chosen"] is not None for record in records),
        "kept": sum(len(record["kept"]) for record in records),
        "pairs": sum(record["rejected"] is not None for record in records),
    }
