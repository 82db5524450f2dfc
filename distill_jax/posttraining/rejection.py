"""Rejection sampling: many answers to each question, of which a verifier keeps the best.

The Llama 3 paper, 4.2.2, draws 10 to 30 answers and lets a reward model pick one. Here a program
checks the answers. The best of each question feeds fine-tuning; with the worst it makes a pair for
preference optimisation.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

from distill_jax import artifacts, parallel, progress
from distill_jax.artifacts import InputError
from distill_jax.data import Tokenizer
from distill_jax.models import Model, Sampling
from distill_jax.posttraining.answers import answer, seed_of
from distill_jax.posttraining.chat import Example, chat_template, encode_prompt, end_of_turn
from distill_jax.posttraining.tasks import Problem, Task, to_messages

_SETTINGS, _SAMPLES = "sampling.json", "samples.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RejectionConfig:
    """How answers are drawn and when one is good enough.

    Attributes:
      samples: answers drawn for each problem, K.
      temperature: of sampling; at 0 all answers to a problem would be the same.
      top_p: sample from the smallest set of tokens with this much probability; None: from all.
      max_new_tokens: where an answer that does not end is cut off.
      threshold: the score from which an answer may be chosen.
      problems_per_batch: problems answered at a time, and committed to disk at a time.
      template: a chat template in place of the tokenizer's own.
      seed: of the sampling.
    """

    samples: int = 10
    temperature: float = 1.0
    top_p: float | None = None
    max_new_tokens: int = 32
    threshold: float = 1.0
    problems_per_batch: int = 8
    template: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "problems_per_batch"):
            if getattr(self, name) < 1:
                raise InputError(f"RejectionConfig.{name} is {getattr(self, name)}; at least 1")
        if self.temperature <= 0:
            raise InputError(f"RejectionConfig.temperature is {self.temperature}; above 0")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"RejectionConfig.top_p is {self.top_p}; in (0, 1]")


def sample(
    model: Model,
    tokenizer: Tokenizer,
    task: Task,
    problems: Sequence[Problem],
    config: RejectionConfig,
) -> list[dict[str, Any]]:
    """Draws and scores `config.samples` answers to each problem, whose prompt is read once.

    Returns:
      One JSON object a problem: "task", "prompt", "answer"; "samples", each with "text", "tokens"
      (without the end of the turn), "score", "finished", "log_prob" and "seed"; "chosen" and
      "rejected", indices of samples as `choose` picks them, or None.
    """
    repeated = [problem for problem in problems for _ in range(config.samples)]
    seeds = [
        seed_of(config.seed, task.name, problem.prompt, index)
        for problem in problems
        for index in range(config.samples)
    ]
    answers = answer(
        model,
        tokenizer,
        repeated,
        sampling=Sampling(temperature=config.temperature, top_p=config.top_p),
        seeds=seeds,
        max_new_tokens=config.max_new_tokens,
        template=config.template,
    )
    samples = [
        {**said._asdict(), "score": task.score(said.text, problem), "seed": seed}
        for said, problem, seed in zip(answers, repeated, seeds, strict=True)
    ]
    records = []
    for index, problem in enumerate(problems):
        drawn = samples[index * config.samples : (index + 1) * config.samples]
        chosen, rejected = choose(drawn, config.threshold)
        records.append(
            {
                "task": task.name,
                "prompt": problem.prompt,
                "answer": problem.answer,
                "samples": drawn,
                "chosen": chosen,
                "rejected": rejected,
            }
        )
    return records


def choose(samples: Sequence[dict[str, Any]], threshold: float) -> tuple[int | None, int | None]:
    """The best sample that is good enough, and the worst one beside it.

    The best has the highest score, at least `threshold`, and ended its turn itself. The worst has
    the lowest score, below the best's. An empty text is neither, and of equals the first is
    taken, so that a text drawn twice counts once.

    Returns:
      (index of the chosen, index of the rejected); None where there is none, and no rejected
      without a chosen.
    """
    said = [index for index, drawn in enumerate(samples) if drawn["text"].strip()]
    good = [i for i in said if samples[i]["finished"] and samples[i]["score"] >= threshold]
    if not good:
        return None, None
    chosen = max(good, key=lambda index: samples[index]["score"])
    worst = min(said, key=lambda index: samples[index]["score"])
    return chosen, worst if samples[worst]["score"] < samples[chosen]["score"] else None


def write_samples(
    directory: str | os.PathLike[str],
    model: Model,
    tokenizer: Tokenizer,
    task: Task,
    problems: Sequence[Problem],
    config: RejectionConfig,
) -> dict[str, float]:
    """`sample` over all problems, into `directory`/samples.jsonl; returns its figures.

    Each batch of problems is committed as a file of its own, so that a later call goes on where
    an earlier one was killed and ends with the same bytes. Of several processes all draw, and the
    first writes.

    Raises:
      InputError: the directory holds samples of other problems or settings.
      Preempted: the job was told to stop (`parallel.stoppable`).
    """
    place = artifacts.epath.Path(directory)
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
    _write_parts(todo, model, tokenizer, task, len(problems), config)
    parallel.on_main(end, what="the last sample")
    return _figures(read_samples(place))


def _write_parts(
    todo: Sequence[tuple[artifacts.epath.Path, Sequence[Problem]]],
    model: Model,
    tokenizer: Tokenizer,
    task: Task,
    count: int,
    config: RejectionConfig,
) -> None:
    """Draws the batches of problems, of `count` in all, that are not on disk yet."""
    done = count - sum(len(batch) for _, batch in todo)
    with progress.bar(f"sample {task.name}", count, unit="problems", done=done) as bar:
        for part, batch in todo:
            parallel.stop_if_preempted("while answers were sampled")
            records = sample(model, tokenizer, task, batch, config)
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
    place = artifacts.epath.Path(directory) / _SAMPLES
    if not place.exists():
        raise InputError(f"{place}: no such file")
    records = []
    for number, line in enumerate(place.read_text().splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"{place}: line {number} is not JSON ({error})") from error
    return records


def chosen_examples(
    tokenizer: Tokenizer, records: Sequence[dict[str, Any]], template: str | None = None
) -> list[Example]:
    """The best answer to each problem that has one, as data for `sft_rows`.

    The tokens are those the model drew, not a second tokenisation of its text; the token that
    ends the turn is learnt with them.
    """
    end = end_of_turn(tokenizer, template)
    examples = []
    for record in records:
        if record["chosen"] is None:
            continue
        prompt = encode_record(tokenizer, record, template)
        tokens = [*record["samples"][record["chosen"]]["tokens"], end]
        examples.append(Example([*prompt, *tokens], [False] * len(prompt) + [True] * len(tokens)))
    return examples


def encode_record(
    tokenizer: Tokenizer, record: dict[str, Any], template: str | None = None
) -> list[int]:
    """The tokens of a record's prompt, as the model saw it when it answered."""
    problem = Problem(prompt=record["prompt"], answer=record["answer"])
    return encode_prompt(tokenizer, to_messages(problem), template)


def _claim(
    place: artifacts.epath.Path,
    tokenizer: Tokenizer,
    task: Task,
    problems: Sequence[Problem],
    config: RejectionConfig,
) -> None:
    """Writes down what the directory is for, or refuses one that is for something else."""
    settings = {
        "config": dataclasses.asdict(config),
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
        "pairs": sum(record["rejected"] is not None for record in records),
    }
