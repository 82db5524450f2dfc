"""Rounds of post-training, and trainings that are averaged."""

import dataclasses

import jax
import numpy as np
import pytest
from etils import epath
from recipes import alone, conversation, recipe_of, two_rounds, works

from distill_jax import models, stages, training
from distill_jax.artifacts import InputError
from distill_jax.posttraining import answers, rejection
from distill_jax.stages import context, posttraining, preflight, report


def test_a_round_starts_from_what_the_one_before_left(run):
    made = posttraining.stages(run(two_rounds()))
    first = "posttraining-rounds/0"
    assert {stage.name: stage.inputs[1] for stage in made} == {
        f"{first}/sft": "distill/seed-0",
        f"{first}/rejection-sample": f"{first}/sft",
        f"{first}/dpo": f"{first}/rejection-sample",
        "sft": f"{first}/dpo",
        "rejection-sample": "sft",
        "dpo": "rejection-sample",
    }
    assert [stage.command for stage in made] == [
        *["posttraining-rounds"] * 3, "sft", "rejection-sample", "dpo",
    ]  # fmt: skip
    assert [stage.name for stage in posttraining.stages(run(two_rounds(sft_train=None)))] == [
        f"{first}/rejection-sample", f"{first}/dpo", "sft", "rejection-sample", "dpo",
    ]  # fmt: skip
    assert set(stages.COMMANDS) >= {stage.command for stage in made}
    judged = dataclasses.replace(
        recipe_of().posttraining.rejection, reward="reward_model", threshold=None
    )
    train = recipe_of().posttraining.sft_train
    pairs = dataclasses.replace(recipe_of().posttraining.reward_model, pairs=__file__)
    made = posttraining.stages(
        run(two_rounds(reward_train=train, reward_model=pairs, rejection=judged))
    )
    assert made[2].inputs == ("corpus", f"{first}/sft", f"{first}/reward-model")


def test_the_report_tells_rounds_apart():
    names = [name for name, _ in report._posttrained(two_rounds()).values()]
    kinds = ("+ SFT", "+ rejection sampling", "+ DPO")
    assert names == [f"{kind}, round {number}" for number in (1, 2) for kind in kinds]
    assert [name for name, _ in report._posttrained(recipe_of()).values()] == list(kinds)


def test_a_stage_is_summed_up_with_what_it_drew_and_what_it_skipped():
    figures = {"tokens": 4096, "loss": 1.234, "skipped": 2}
    learnt = "4,096 tokens, loss 1.23 at the end, 2 records skipped"
    assert report._summary(figures) == learnt
    drawn = {"samples": 1440, "solved": 19, "problems": 24}
    said = report._summary(figures | drawn)
    assert said == f"1,440 answers, the best for 19 of 24 prompts; {learnt}"


@pytest.mark.slow
def test_every_round_has_samples_and_preferences_of_its_own(run, tokenizer, monkeypatch):
    def answer(model, tokenizer, problems, *, seeds, **_):
        """Of two samples one is right; the other tells its seed, which tells the round."""
        texts = [
            problem.answer if place % 2 else str(seed)
            for place, (problem, seed) in enumerate(zip(problems, seeds, strict=True))
        ]
        return [answers.Answer(text, tokenizer.encode(text), -1.0, True) for text in texts]

    def train_averaged(self, place, model, *_, runs, split_time):
        assert (runs, split_time) == (3, context.kind(place.name) != context.DPO)
        grown = jax.tree.map(lambda leaf: leaf * 2, model.params)
        self.save(place, models.Model(model.config, grown))
        return {"steps": 1}

    pairs_of, pair_rows = [], posttraining.posttraining.pair_rows

    def seen(pairs, *rest, **options):
        pairs_of.append({tuple(pair.rejected) for pair in pairs})
        return pair_rows(pairs, *rest, **options)

    monkeypatch.setattr(rejection, "answer", answer)
    monkeypatch.setattr(stages.Run, "train_averaged", train_averaged)

    def with_reference(*_, compute_dtype, mesh):
        assert (compute_dtype, mesh) == ("bfloat16", of_recipe.mesh)
        return _[1]

    monkeypatch.setattr(posttraining.posttraining, "pair_rows", seen)
    monkeypatch.setattr(posttraining.posttraining, "with_reference", with_reference)
    monkeypatch.setattr(posttraining, "_kl_to", lambda *_: 0.0)
    recipe = recipe_of(
        "problems=4", "rejection.samples=2", "averaged=3", "dpo_train.compute_dtype=bfloat16"
    )
    first = dataclasses.replace(recipe.posttraining, sft_train=None)
    last = dataclasses.replace(first, rejection=dataclasses.replace(first.rejection, seed=1))
    recipe = dataclasses.replace(recipe, posttraining_rounds=(first,), posttraining=last)
    preflight.check(recipe)
    of_recipe = run(recipe)
    made = works(of_recipe)
    for place, stage in made.values():
        stage.work(place)
    before, after = pairs_of
    assert len(before) == len(after) == 4
    assert not before & after
    assert context.model_stages(recipe)[-4:] == [*made]
    start = of_recipe.load(context.student(0))
    for grown, name in enumerate(made, 1):
        np.testing.assert_array_equal(
            of_recipe.load(name).params["embedding"], start.params["embedding"] * 2**grown
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"replay": 0.5, "length": 64}, r"posttraining_rounds\.0\.replay: rows .* 128 tokens"),
        ({"template": "llama3"}, r"posttraining_rounds: have another template than postt"),
        ({"task": "capitals"}, r"posttraining_rounds: have another task than posttraining"),
        (dict.fromkeys(("sft_train", "rejection_train", "dpo_train")), "no stage is trained"),
        ({"averaged": 0}, r"posttraining\.averaged is 0; it must be positive"),
    ],
)
def test_rounds_that_do_not_fit_are_refused(change, message):
    post, change = recipe_of().posttraining, dict(change)
    length, template = change.pop("length", 128), change.pop("template", None)
    change["sft"] = dataclasses.replace(post.sft, sequence_length=length, template=template)
    for part in ("on_policy", "rejection"):
        change[part] = dataclasses.replace(getattr(post, part), template=template)
    with pytest.raises(InputError, match=message):
        two_rounds(**change)


def test_conversations_that_only_on_policy_distillation_learns_are_checked(tmp_path):
    asked = tmp_path / "asked.jsonl"
    asked.write_text(conversation("2 + 2?", "4"))
    post = recipe_of().posttraining
    on_policy = dataclasses.replace(post.on_policy, prompts=str(asked), student_share=0.5)
    without = {"task": None, "sft_train": None, "rejection_train": None, "dpo_train": None}
    change = without | {"on_policy": on_policy, "on_policy_train": post.sft_train}
    with pytest.raises(InputError, match=r"sft\.data: needs the problems of posttraining\.task"):
        dataclasses.replace(post, **change)
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{")
    sft = dataclasses.replace(post.sft, data=str(broken))
    recipe = dataclasses.replace(
        recipe_of(), posttraining=dataclasses.replace(post, **change, sft=sft)
    )
    with pytest.raises(InputError, match=r"broken\.jsonl: line 1: not JSON"):
        preflight.check(recipe)


def test_the_template_decides_every_stage(run):
    post = recipe_of().posttraining
    parts = ("sft", "on_policy", "rejection")
    changed = {
        part: dataclasses.replace(getattr(post, part), template="llama3") for part in parts
    } | {
        "reward_train": post.sft_train,
        "reward_model": dataclasses.replace(post.reward_model, pairs=__file__),
    }
    other = dataclasses.replace(recipe_of(), posttraining=dataclasses.replace(post, **changed))
    kept = {name: changed[name] for name in ("reward_train", "reward_model")}
    one = dataclasses.replace(recipe_of(), posttraining=dataclasses.replace(post, **kept))
    before, after = (
        {stage.name: stage.recipe for stage in posttraining.stages(run(recipe))}
        for recipe in (one, other)
    )
    assert before.keys() == after.keys() >= {context.REWARD}
    assert not [name for name in before if before[name] == after[name]]


def test_rounds_come_before_the_last():
    with pytest.raises(InputError, match="posttraining_rounds: come before posttraining, which"):
        dataclasses.replace(two_rounds(), posttraining=None)


def test_wrong_data_of_a_round_are_told_with_its_name():
    asked = dataclasses.replace(recipe_of().posttraining.dpo, sequence_length=513)
    with pytest.raises(InputError, match=r"posttraining_rounds\.0: .*dpo\.sequence_length: 513"):
        preflight.check(two_rounds(dpo=asked))


@pytest.mark.slow
def test_a_stage_leaves_the_mean_of_its_runs_however_often_it_was_killed(
    run, tmp_path, monkeypatch
):
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(conversation(f"{a} + 2?", str(a + 2)) for a in range(99)))
    alone_of = {}
    for seed in (3, 4):
        single = works(run(alone(f"sft.data={path}", f"sft_train.seed={seed}")))[context.SFT][1]
        place = tmp_path / f"seed-{seed}"
        place.mkdir()
        alone_of[seed] = single.work(epath.Path(place)), models.load(place).params
    recipe = alone(f"sft.data={path}", "averaged=2", "sft_train.seed=3")
    place, stage = works(run(recipe))[context.SFT]
    train, average = training.train, models.average

    class Killed(Exception):
        pass

    def killed_in_the_second_run(*arguments, name, **options):
        if name == "sft/run-1":
            raise Killed
        return train(*arguments, name=name, **options)

    def killed_before_the_mean(*_, **__):
        raise Killed

    for room, function, broken, whole in (
        (training, "train", killed_in_the_second_run, train),
        (models, "average", killed_before_the_mean, average),
    ):
        monkeypatch.setattr(room, function, broken)
        with pytest.raises(Killed):
            stage.work(place)
        monkeypatch.setattr(room, function, whole)
    figures = stage.work(place)
    assert stage.work(place) == figures  # as after a kill before the manifest
    assert (figures["averaged"], figures["steps"]) == (2, 4)
    (first, one), (second, other) = alone_of.values()
    assert figures["loss"] == pytest.approx((first["loss"] + second["loss"]) / 2)
    moved = []

    def compare(mean, a, b):
        np.testing.assert_allclose(mean, (a + b) / 2, rtol=1e-5, atol=1e-7)
        moved.append(float(np.abs(a - b).max()))

    jax.tree.map(compare, models.load(place).params, one, other)
    assert max(moved) > 1e-5
    assert not models.is_saved(place / "run-0")
    (panel,) = report._posttraining(run(recipe))
    shown = [one["loss"][-1] for one in panel.curve.runs]
    assert shown == [first["loss"], second["loss"]]
