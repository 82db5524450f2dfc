"""The measure of post-training's effects: its questions, its stages, and its statistics."""

import importlib
import json
import pathlib
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.special
import scipy.stats
from etils import epath

from distill_jax import models, posttraining
from distill_jax.artifacts import InputError, diff

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "measure_posttraining.py"


@pytest.fixture(scope="module")
def measure():
    """The scripts' modules, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        patch.syspath_prepend(SCRIPT.parent / "effects")
        names = (SCRIPT.stem, "alignment", "distillation", "questions", "runs", "sizes")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def _talks(file):
    return [json.loads(line)["messages"] for line in pathlib.Path(file).read_text().splitlines()]


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
    talks = _talks(file)
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


@pytest.fixture(scope="module")
def begun(measure, tmp_path_factory):
    """A run of seed 7, its files, and its stages by name."""
    size = measure.sizes.SIZES["full"]
    run, files = measure.runs.begin(size, 7, epath.Path(tmp_path_factory.mktemp("begun")))
    parts = (measure.alignment, measure.distillation)
    made = [stage for part in parts for stage in part.stages(run, files, size)]
    return SimpleNamespace(run=run, files=files, stages={stage.name: stage for stage in made})


def test_no_question_is_learnt_from_twice(measure, begun):
    asked = {
        name: [talk[0]["content"] for talk in _talks(file)] for name, file in begun.files.items()
    }
    assert {name: len(some) for name, some in asked.items()} == measure.sizes.SIZES["full"].asked
    assert len(set().union(*asked.values())) == sum(map(len, asked.values()))


def test_ways_are_the_recipes_own_stages_but_for_what_is_compared(begun):
    stages, prompts = begun.stages, begun.files["prompts"]
    same = {
        ("sft-longer", "sft"): ["sft_train.steps: 320 -> 240"],
        ("fresh/dpo-loose", "fresh/dpo"): ["dpo.beta: 0.5 -> 3.0"],
        ("fresh/dpo-loose-without-nll", "fresh/dpo-loose"): ["dpo.nll_weight: 0.0 -> 0.2"],
        ("dpo-old-pairs", "fresh/dpo"): [],
        ("rejection-sample", "fresh/rejection-sample"): [
            f"rejection.prompts: '{prompts}' -> '{begun.files['fresh']}'"
        ],
        ("given-forward-kl", "given-reverse-kl"): [
            "on_policy.divergence: 'forward_kl' -> 'reverse_kl'",
        ],
        ("own-forward-kl", "own-reverse-kl"): [
            "on_policy.divergence: 'forward_kl' -> 'reverse_kl'",
        ],
        ("given-reverse-kl", "own-reverse-kl"): ["on_policy.student_share: 0.0 -> 1.0"],
        ("gkd", "own-reverse-kl"): [
            "on_policy.divergence: 'gkd' -> 'reverse_kl'",
            "on_policy.student_share: 0.5 -> 1.0",
        ],
        ("minillm", "gkd"): ["on_policy.method: 'minillm' -> 'gkd'"],
    }
    for (ours, theirs), differences in same.items():
        assert diff(stages[ours].recipe, stages[theirs].recipe) == differences, (ours, theirs)


def test_dpo_starts_from_the_model_that_wrote_its_fresh_pairs(begun):
    inputs = {name: stage.inputs for name, stage in begun.stages.items()}
    assert inputs["sft"] == inputs["sft-longer"] == ("corpus", "distill/seed-7")
    again = "fresh/rejection-sample"
    assert inputs[again] == inputs["dpo-old-pairs"] == ("corpus", "rejection-sample")
    for name in ("fresh/dpo", "fresh/dpo-loose", "fresh/dpo-loose-without-nll"):
        assert inputs[name] == ("corpus", "rejection-sample", again)
    for name in ("given-forward-kl", "own-reverse-kl", "gkd", "minillm"):
        assert inputs[name] == ("corpus", "rejection-sample", "teachers/large")


def test_entropy_and_loss_are_those_at_the_tokens_of_right_answers(measure, begun, monkeypatch):
    problems = measure.questions.questions("train", 3, 6, 0)
    measure.runs.write_tokenizer(begun.run.directory / "corpus")
    tokenizer, row = begun.run.tokenizer, measure.runs.ROW
    said = np.random.default_rng(0).normal(0, 3, (3, row, tokenizer.vocab_size))
    monkeypatch.setattr(models, "logits", lambda *model_and_rows: said.astype(np.float32))
    model = SimpleNamespace(config=None, params={})
    found = measure.distillation._of_right_answers(begun.run, model, problems)
    entropies, losses = [], []
    for logits, problem in zip(said, problems):
        prompt = posttraining.encode_prompt(tokenizer, posttraining.to_messages(problem))
        answer = [*tokenizer.encode(problem.answer), posttraining.end_of_turn(tokenizer)]
        for place, token in enumerate(answer, start=len(prompt) - 1):
            log_probs = scipy.special.log_softmax(logits[place])
            entropies.append(scipy.stats.entropy(np.exp(log_probs)))
            losses.append(-log_probs[token])
    assert found["entropy"] == pytest.approx(np.mean(entropies), rel=1e-5)
    assert found["cross_entropy"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_claim_is_of_models_and_figures_that_are_measured(measure):
    script, names = measure.measure_posttraining, ("alignment", "distillation")
    assert set(script.CLAIMS) == set(script.COLUMNS) == set(names)
    for name in names:
        models, columns = getattr(measure, name).MODELS, script.COLUMNS[name]
        for claim in script.CLAIMS[name]:
            assert {claim.ours, claim.theirs} <= set(models)
            assert claim.figure in columns
