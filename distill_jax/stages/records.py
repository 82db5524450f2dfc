"""What post-training reads: a task's problems, files, and text of the corpus."""

import dataclasses
import hashlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

from distill_jax import data, parallel, posttraining
from distill_jax.artifacts import InputError, write_bytes
from distill_jax.recipe import PostTrainingConfig
from distill_jax.stages.context import Run

# Names the samples of a recipe that has no task of its own.
FILES = posttraining.Task(
    name="files", train=(), held_out=(), scorer=posttraining.VERIFIERS["text"]
)


def task_of(config: PostTrainingConfig) -> posttraining.Task:
    """The recipe's task, with as many of its problems as the recipe wants."""
    assert config.task is not None  # where it is needed; PostTrainingConfig checks that
    task = posttraining.load_task(config.task)
    return dataclasses.replace(task, train=task.train[: config.problems])


def fine_tuning_rows(
    run: Run, config: PostTrainingConfig, conversations: Sequence[Any]
) -> list[posttraining.Record]:
    """Rows of the conversations, and as many of the corpus as `replay` asks for."""
    rows = posttraining.sft_rows(run.tokenizer, conversations, config.sft)
    if not config.replay:
        return rows
    return posttraining.with_replay(rows, run.corpus("train"), config.replay)


def check_alike(place: epath.Path, rows: Iterable[bytes]) -> None:
    """Checks that all processes read the same for the stage in `place`.

    Raises:
      InputError: they did not.
    """
    digest = hashlib.sha256(b"".join(rows)).hexdigest()
    if len(set(parallel.gather(digest, what=f"the rows of {place.name}"))) > 1:
        raise InputError(
            f"{place.name}: hosts read different rows; give all of them the same files"
        )


def figures_of(place: epath.Path, rejects: data.Rejects, used: int) -> dict[str, int]:
    """Figures of records from files; those that were skipped are told, and listed in skipped.txt.

    Raises:
      InputError: none is left.
    """
    if skipped := rejects.messages:
        first = f"{len(skipped)} records were skipped; the first: {skipped[0]}"
        if not used:
            raise InputError(f"{place.name}: no record can be used; {first}")
        if parallel.is_main():
            print(f"{place.name}: {first}", file=sys.stderr)
            write_bytes(place / "skipped.txt", "".join(f"{line}\n" for line in skipped).encode())
    return {"used": used, "skipped": len(skipped)}


def conversations(
    run: Run, config: PostTrainingConfig, place: epath.Path | None
) -> tuple[list[Any], dict[str, int]]:
    """What fine-tuning learns, and figures of its files; without a place nobody is told of them."""
    rejects = data.Rejects(config.sft.bad_rows)
    found: list[Any] = list(posttraining.read_examples(run.tokenizer, config.sft, rejects))
    figures = {}
    if place is not None and config.sft.files:
        figures = figures_of(place, rejects, len(found))
    if config.sft.uses_task:
        found += posttraining.demonstrations(task_of(config).train)
    return found, figures


def problems(
    run: Run,
    config: PostTrainingConfig,
    asked: posttraining.PromptConfig,
    longest: int,
    place: epath.Path,
) -> tuple[list[posttraining.Problem], dict[str, int]]:
    """What a stage asks, and figures of the files; a question and its answer have `longest`."""
    rejects = data.Rejects(asked.bad_rows)
    found = list(posttraining.read_problems(run.tokenizer, asked, longest, rejects))
    figures = figures_of(place, rejects, len(found)) if asked.files else {}
    if asked.asks_task:
        found += task_of(config).train
    return found, figures
