"""The measure of post-training's effects: its questions, its stages, and its statistics."""

import importlib
import json
import pathlib
from types import SimpleNamespace

import pytest
from etils import epath

from distill_jax import posttraining
from distill_jax.artifacts import InputError, diff
from distill_jax.stages import Run

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "measure_posttraining.py"


@pytest.fixture(scope="module")
def measure():
    """The scripts' modules, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        patch.syspath_prepend(SCRIPT.parent / "effects")
        names = (SCRIPT.stem, "alignment", "questions", "runs", "sizes")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def test_no_seed_learns_a_question_that_another_measures_on(measure):
    of_splits = {
        split: {
            one.prompt
            for seed in (0, 1, 1000)
            for one in measure.questions.questions(split, 100, 4, seed)
        }
        for split in ("train", "tuning", "held_out")
    }
    assert len(set.union(*of_splits.values())) == sum(map(len, of_splits.values()))
    assert {measure.runs.measured_on(seed) for seed in (0, 1, 2)} == {"held_out"}
    assert measure.runs.measured_on(1000) == "tuning"


def test_questions_differ_by_seed_and_not_among_themselves(measure):
    drawn = [measure.questions.questions("train", 100, 4, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({one.prompt for one in drawn[0]}) == 100
    with pytest.raises(InputError, match="of 1 digits there are no 10 questions for train"):
        measure.questions.questions("train", 10, 1, 0)


def test_files_hold_each_question_with_its_right_answer(measure, tmp_path):
    problems = measure.questions.questions("train", 3, 4, 0)
    file = measure.questions.write(epath.Path(tmp_path / "file.jsonl"), problems)
    talks = [json.loads(line)["messages"] for line in pathlib.Path(file).read_text().splitlines()]
    assert [[turn["role"] for turn in talk] for talk in talks] == [["user", "assistant"]] * 3
    score = posttraining.VERIFIERS[measure.questions.VERIFIER]
    for problem, (asked, said) in zip(problems, talks, strict=True):
        digits = asked["content"].removeprefix("Sort ")
        assert said["content"] == "".join(sorted(digits))
        assert score(said["content"], problem) == 1
        assert score(digits[::-1], problem) == (digits[::-1] == said["content"])


@pytest.mark.parametrize(
    ("ours", "said", "verdict"),
    [
        ([0.9, 0.8, 0.85], "above", "as published"),
        ([0.9, 0.8, 0.85], "below", "not as published"),
        ([0.9, 0.1, 0.45], "above", "within noise"),
        ([0.9, 0.8, 0.85], "not below", "as published"),
        ([0.9, 0.1, 0.45], "not below", "within noise"),
        ([0.1, 0.02, 0.07], "not below", "not as published"),
        ([0.9], "above", "one seed tells nothing of noise"),
    ],
)
def test_a_claim_is_borne_out_if_the_difference_is_none_of_noise(measure, ours, said, verdict):
    script = measure.measure_posttraining
    theirs = [0.5, 0.38, 0.44][: len(ours)]
    claim = script.Claim("greedy", "dpo", "sft", said)
    found = script.difference(("dpo", ours), ("sft", theirs), "greedy")
    assert script.verdict(claim, found) == verdict


def test_ways_are_the_recipes_own_stages_but_for_what_is_compared(measure, tmp_path):
    size = measure.sizes.SIZES["full"]
    file = measure.questions.write(
        epath.Path(tmp_path / "file.jsonl"), measure.questions.questions("train", 4, 6, 7)
    )
    run = Run(measure.runs.recipe(7, file, file, size.settings), epath.Path(tmp_path))
    made = {stage.name: stage for stage in measure.alignment._stages(run, size)}
    ours, theirs = (made[name] for name in ("dpo-without-nll", "dpo"))
    assert diff(ours.recipe, theirs.recipe) == ["dpo.nll_weight: 0.0 -> 0.2"]
    assert ours.inputs == theirs.inputs == ("corpus", "rejection-sample")
    ours, theirs = (made[name] for name in ("sft-longer", "sft"))
    assert diff(ours.recipe, theirs.recipe) == ["sft_train.steps: 320 -> 240"]
    assert ours.inputs == theirs.inputs == ("corpus", "distill/seed-7")
