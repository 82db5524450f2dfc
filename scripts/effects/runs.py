"""Runs of the tiny recipe's post-training, on questions in place of its task."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import questions
import sizes
from etils import epath

from distill_jax import data, models, posttraining
from distill_jax.pipeline import Stage
from distill_jax.recipe import PostTrainingConfig, Recipe, load_recipe, to_json
from distill_jax.stages import context
from distill_jax.stages import posttraining as recipe_stages

CONFIG = pathlib.Path(__file__).resolve().parents[2] / "configs" / "tiny.py"
TUNING_SEED = 1000
"""From here on a seed is for choosing: it measures on the questions of tuning."""
ROW = 40
"""Tokens that hold a question with its answer."""
_NEW_TOKENS = 18
# README's figures are of a tokenizer that was trained on all of these, the last three unused.
_WORDS = ("user\nassistant\nSort ", "It is .", "Sorted: ", " sorted is ")


def begin(size: sizes.Size, seed: int, place: epath.Path) -> tuple[context.Run, dict[str, str]]:
    """A run in `place`, and by their names the files that its stages learn from."""
    drawn = iter(questions.questions("train", sum(size.asked.values()), size.digits, seed))
    files = {
        name: questions.write(place / f"{name}.jsonl", [next(drawn) for _ in range(count)])
        for name, count in size.asked.items()
    }
    return context.Run(recipe(seed, files, size.settings), place / "run"), files


def recipe(seed: int, files: Mapping[str, str], settings: Mapping[str, Any]) -> Recipe:
    """The tiny recipe with its post-training on these files, in one seed for everything."""
    parts = ["sft_train", "on_policy", "on_policy_train", "rejection", "rejection_train"]
    fixed = {
        "size": "test",
        "on_policy": "gkd",
        "seeds": [seed],
        **{f"posttraining.{part}.seed": seed for part in (*parts, "dpo_train")},
        "posttraining.task": "null",
        "posttraining.problems": "null",
        "posttraining.replay": 0.0,
        "posttraining.sft.data": files[sizes.DEMONSTRATIONS],
        "posttraining.on_policy.prompts": files[sizes.PROMPTS],
        "posttraining.on_policy.max_new_tokens": _NEW_TOKENS,
        "posttraining.rejection.prompts": files[sizes.PROMPTS],
        "posttraining.rejection.reward": questions.VERIFIER,
        "posttraining.rejection.max_new_tokens": _NEW_TOKENS,
        "posttraining.rejection.problems_per_batch": 64,
        "posttraining.dpo.sequence_length": ROW,
    }
    chosen = fixed | {f"posttraining.{name}": value for name, value in settings.items()}
    return load_recipe(CONFIG, [f"{name}={value}" for name, value in chosen.items()])


def begun(run: context.Run, shape: models.LlamaConfig) -> list[Stage]:
    """A tokenizer of the questions, and a student of random parameters."""
    seed = run.recipe.seeds[0]

    def tokenizer(place: epath.Path) -> dict[str, Any]:
        write_tokenizer(place)
        return {}

    def start(place: epath.Path) -> dict[str, Any]:
        student = dataclasses.replace(shape, vocab_size=run.tokenizer.vocab_size)
        run.save(place, run.init(student, seed))
        return {"parameters": student.parameters}

    return [
        Stage(name=context.CORPUS, command="corpus", recipe={}, inputs=(), work=tokenizer),
        Stage(
            name=context.student(seed),
            command="distill",
            recipe={"shape": to_json(shape), "seed": seed},
            inputs=(context.CORPUS,),
            work=start,
        ),
    ]


def write_tokenizer(place: epath.Path) -> None:
    """A byte-level tokenizer that knows words of the chats; a digit is a token."""
    data.train_tokenizer(_WORDS, 288, specials=posttraining.CHATML_SPECIALS).save(place)


def stage(
    run: context.Run,
    kind: str,
    name: str,
    start: str,
    *,
    reads: Sequence[str] = (),
    **changes: Any,
) -> Stage:
    """The recipe's own stage of a kind, in a directory of another name, from another start.

    `changes` are of the recipe, by dotted names below `posttraining`; `reads` are further stages
    that it reads.
    """
    assert run.recipe.posttraining is not None
    post = with_changes(run.recipe.posttraining, changes)
    made = recipe_stages.stage(run, post, str(pathlib.PurePath(name).with_name(kind)), start)
    return dataclasses.replace(made, name=name, command=name, inputs=(*made.inputs, *reads))


def measuring(
    name: str, models: Sequence[str], size: sizes.Size, measure: Callable[[], dict[str, Any]]
) -> Stage:
    """The stage that measures what other stages left."""
    return Stage(
        name=name,
        command=name,
        recipe={"questions": size.measured, "digits": size.digits},
        inputs=(context.CORPUS, *models),
        work=lambda place: measure(),
    )


def with_changes(post: PostTrainingConfig, changes: Mapping[str, Any]) -> PostTrainingConfig:
    """With fields changed, one after the other."""
    for name, value in changes.items():
        part, _, field = name.partition(".")
        inner = dataclasses.replace(getattr(post, part), **{field: value}) if field else value
        post = dataclasses.replace(post, **{part: inner})
    return post


def scores(
    run: context.Run,
    model: models.Model,
    problems: Sequence[posttraining.Problem],
    samples: int = 4,
) -> dict[str, float]:
    """{"greedy", "sampled"}: shares of right answers."""
    task = posttraining.Task(
        name="sort",
        train=(),
        held_out=tuple(problems),
        scorer=posttraining.VERIFIERS[questions.VERIFIER],
    )
    assert run.recipe.posttraining is not None
    asked = dataclasses.replace(run.recipe.posttraining.rejection, samples=samples)
    answer = functools.partial(posttraining.accuracy, max_new_tokens=asked.max_new_tokens)
    greedy = answer(model, run.tokenizer, task)
    records = []
    for start in range(0, len(problems), 64):
        part = problems[start : start + 64]
        records += posttraining.sample(model, run.tokenizer, task, part, asked)
    right = [one["score"] for record in records for one in record["samples"]]
    return {"greedy": greedy["accuracy"], "sampled": sum(right) / len(right)}


def measured_problems(run: context.Run, size: sizes.Size) -> list[posttraining.Problem]:
    """The questions that a run measures with."""
    return questions.questions(measured_on(run.recipe.seeds[0]), size.measured, size.digits, seed=0)


def measured_on(seed: int) -> str:
    """The split that a seed measures on."""
    return "tuning" if seed >= TUNING_SEED else "held_out"
