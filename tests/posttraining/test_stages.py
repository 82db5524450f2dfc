"""What a recipe says of post-training, on a model and a tokenizer that lie where a run has them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recipes import alone, conversation, recipe_of, works
from scipy.special import log_softmax

from distill_jax import models, parallel
from distill_jax.artifacts import InputError
from distill_jax.posttraining import answers, encode_pair, read_samples, rejection
from distill_jax.recipe import TokenizerConfig
from distill_jax.stages import context, posttraining, preflight, report
from distill_jax.training import read_metrics


def test_a_model_is_fine_tuned_on_a_file_alone(run, tmp_path, capsys):
    path = tmp_path / "chats.jsonl"
    path.write_text(f"{conversation('2 + 2?', '4')}\n{{\n{conversation('3 + 3?', '6')}\n")
    recipe = alone(f"sft.data={path}", "sft.bad_rows=skip")
    preflight.check(recipe)
    made = works(run(recipe))
    assert made.keys() == {context.SFT}
    place, stage = made[context.SFT]
    figures = stage.work(place)
    assert {name: figures[name] for name in ("used", "skipped", "rows", "steps")} == {
        "used": 2,
        "skipped": 1,
        "rows": 1,
        "steps": 2,
    }
    (skipped,) = (place / "skipped.txt").read_text().splitlines()
    assert skipped.startswith(f"{path}: line 2: not JSON (")
    assert f"sft: 1 records were skipped; the first: {path}: line 2" in capsys.readouterr().err
    # Both answers, each of one token and the end of its turn.
    assert read_metrics(place / "metrics.jsonl")[0]["weight"] == 8 * 2 * 2
    before, after = (models.load(tmp_path / name).params for name in ("distill/seed-0", "sft"))
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, after)
    assert max(jax.tree.leaves(moved)) > 0
    assert models.is_saved(place)


def test_files_stand_beside_the_task_and_decide_the_stage(run, tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(conversation("2 + 2?", "4"))
    recipe = recipe_of(f'sft.data=["task", "{path}"]')
    (_, before), (_, rejection) = [works(run(recipe))[name] for name in (context.SFT, "dpo")]
    assert list(before.external) == [str(path)]
    assert not rejection.external
    path.write_text(conversation("2 + 2?", "5"))
    assert works(run(recipe))[context.SFT][1].external != before.external


def test_how_many_answers_are_written_at_a_time_makes_no_other_stage(run):
    few, many, other = (
        works(run(recipe_of(f"rejection.{setting}")))
        for setting in ("rows_at_once=4", "rows_at_once=64", "samples=3")
    )
    for name in (context.REJECTION, context.DPO):
        assert few[name][1].recipe == many[name][1].recipe != other[name][1].recipe


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("task=null",), r"posttraining\.sft\.data: needs the problems of posttraining\.task"),
        (
            ("task=null", "sft.data=x.jsonl"),
            r"rejection\.prompts: need those of posttraining\.task",
        ),
        (("rejection_train=null",), r"dpo\.pairs: needs the samples of rejection_train"),
        (("sft.data=[]",), r"posttraining\.sft\.data: no source"),
        (("dpo.pairs=",), r"posttraining\.dpo\.pairs: no source"),
    ],
)
def test_what_a_stage_needs_must_be_there(overrides, message):
    with pytest.raises(InputError, match=message):
        recipe_of(*overrides)


@pytest.mark.parametrize(
    ("lines", "overrides", "message"),
    [
        ("{", (), r"chats\.jsonl: line 1: not JSON"),
        (f"{conversation('a', 'b')}\n[]", (), r"chats\.jsonl: line 2: not a JSON object"),
        (
            "{}\n{}",
            ("sft.bad_rows=skip",),
            r"sft\.data: no record can be used; the first: .*line 1",
        ),
        ("", (), r"posttraining\.sft\.data: no record can be used$"),
        (
            conversation("a", "b"),
            ("sft.sequence_length=513",),
            r"513 is more than .* of 512 tokens",
        ),
    ],
)
def test_bad_data_are_told_before_any_work(tmp_path, lines, overrides, message):
    path = tmp_path / "chats.jsonl"
    path.write_text(lines)
    with pytest.raises(InputError, match=message) as caught:
        preflight.check(alone(f"sft.data={path}", *overrides))
    assert "\n" not in str(caught.value)


def test_a_known_tokenizer_tells_lengths_before_any_work(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    path = tmp_path / "chats.jsonl"
    path.write_text(f"{conversation('a', 'b')}\n{conversation('a', 'b ' * 200)}")
    recipe = alone(f"sft.data={path}")
    preflight.check(recipe)
    known = dataclasses.replace(recipe, tokenizer=TokenizerConfig(source=str(tmp_path)))
    with pytest.raises(InputError, match=r"line 2: \d+ tokens do not fit in 128"):
        preflight.check(known)


def test_a_length_counts_where_there_is_a_stage_for_it():
    with pytest.raises(InputError, match=r"posttraining\.dpo\.sequence_length: 513 is more"):
        preflight.check(recipe_of("dpo.sequence_length=513"))
    preflight.check(recipe_of("dpo.sequence_length=513", "dpo_train=null"))
    recipe = recipe_of("reward_model.sequence_length=513", "reward_model.pairs=pairs.jsonl")
    train = recipe.posttraining.sft_train
    judged = dataclasses.replace(recipe.posttraining, reward_train=train)
    with pytest.raises(InputError, match=r"posttraining\.reward_model\.sequence_length: 513 is"):
        preflight.check(dataclasses.replace(recipe, posttraining=judged))


def test_rows_that_differ_from_host_to_host_are_refused(run, tmp_path, monkeypatch):
    path = tmp_path / "chats.jsonl"
    path.write_text(conversation("2 + 2?", "4"))
    place, stage = works(run(alone(f"sft.data={path}")))[context.SFT]
    monkeypatch.setattr(parallel, "gather", lambda value, **_: [value, "another"])
    with pytest.raises(InputError, match="sft: hosts read different rows"):
        stage.work(place)


def kl_by_hand(policy, reference, sequences) -> float:
    """KL(policy || reference) a token of the answers, in float64 from whole logits."""
    sums = count = 0.0
    for prompt, answer in sequences:
        tokens = jnp.asarray([[*prompt, *answer]])
        p, q = (
            log_softmax(np.asarray(models.logits(m.config, m.params, tokens), np.float64), -1)
            for m in (policy, reference)
        )
        kl = (np.exp(p) * (p - q)).sum(-1)[0]
        sums += kl[len(prompt) - 1 : -1].sum()
        count += len(answer)
    return sums / count


@pytest.mark.slow
def test_preferences_of_a_file_are_learnt_after_fine_tuning(run, tokenizer, tmp_path):
    chats, pairs = tmp_path / "chats.jsonl", tmp_path / "pairs.jsonl"
    chats.write_text(conversation("2 + 2?", "4"))
    record = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5 or 6"}
    pairs.write_text("\n".join(map(json.dumps, [record, {**record, "rejected": "4"}])))
    recipe = recipe_of(
        "task=null",
        "rejection_train=null",
        "dpo_train.steps=12",
        "dpo_train.optimizer.learning_rate=0.05",
        f"sft.data={chats}",
        f"dpo.pairs={pairs}",
        "dpo.bad_rows=skip",
        "dpo.loss=ipo",
        "dpo.length_normalised=true",
    )
    preflight.check(recipe)
    made = works(run(recipe))
    assert list(made) == [context.SFT, context.DPO]
    assert made[context.DPO][1].inputs == (context.CORPUS, context.SFT)
    for place, stage in made.values():
        figures = stage.work(place)
    assert (figures["used"], figures["skipped"]) == (1, 1)
    lines = read_metrics(tmp_path / "dpo" / "metrics.jsonl")
    assert lines[0]["reward_margin"] == pytest.approx(0, abs=1e-4)
    assert lines[-1]["reward_margin"] > 0
    assert lines[-1]["reward_accuracy"] == 1
    assert lines[-1]["ipo"] < lines[0]["ipo"]
    policy, reference = (models.load(tmp_path / name) for name in ("dpo", "sft"))
    pair = encode_pair(tokenizer, [{"role": "user", "content": "2 + 2?"}], "4", "5 or 6")
    sequences = [(pair.prompt, pair.chosen), (pair.prompt, pair.rejected)]
    expected = kl_by_hand(policy, reference, sequences)
    assert figures["kl_to_reference"] == pytest.approx(expected, rel=1e-3)
    assert expected > 1e-3
    pairs.write_text(json.dumps(record | {"chosen": "5 or 6"}))
    with pytest.raises(InputError, match=r"dpo\.pairs: no record can be used; the first: .*same"):
        preflight.check(recipe)


@pytest.mark.slow
def test_questions_of_a_file_are_judged_by_a_function_of_ones_own(
    run, tokenizer, tmp_path, monkeypatch
):
    asked, code = tmp_path / "asked.jsonl", tmp_path / "mine.py"
    asked.write_text("\n".join(conversation(f"{a} + 3?", str(a + 3)) for a in range(3)))
    code.write_text(
        "def near(prompts, completions, references):\n"
        "    assert all(len(messages) == 1 for messages in prompts)\n"
        "    pairs = zip(completions, references, strict=True)\n"
        "    return [-abs(float(said) - float(right)) for said, right in pairs]\n"
    )

    def answer(model, tokenizer, problems, *, seeds, sharding, **_):
        assert sharding == parallel.batch_sharding(parallel.make_mesh())
        drawn = [str(seed % 10) for seed in seeds]
        return [answers.Answer(text, tokenizer.encode(text), -1.0, True) for text in drawn]

    monkeypatch.setattr(rejection, "answer", answer)
    recipe = alone(
        f"sft.data={asked}",
        f"rejection.prompts={asked}",
        f"rejection.reward={code}:near",
        "rejection.threshold=-2",
        "rejection.keep=all",
    )
    train = recipe.posttraining.sft_train
    config = dataclasses.replace(recipe.posttraining, rejection_train=train)
    recipe = dataclasses.replace(recipe, posttraining=config)
    preflight.check(recipe)
    made = works(run(recipe))
    place, stage = made[context.REJECTION]
    assert stage.external.keys() == {str(asked), str(code)}
    models.save(tmp_path / context.SFT, models.load(tmp_path / context.student(0)))
    figures = stage.work(place)
    records = read_samples(place / "samples")
    assert [record["prompt"] for record in records] == [f"{a} + 3?" for a in range(3)]
    kept = 0
    for record in records:
        for one in record["samples"]:
            assert one["score"] == -abs(int(one["text"]) - int(record["answer"]))
        kept += len({one["text"] for one in record["samples"] if one["score"] >= -2})
    assert (figures["used"], figures["kept"]) == (3, kept)
    assert kept > 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reward=teacher:nobody", r"rejection\.reward: 'nobody' is none of the teachers large"),
        ("reward=nowhere.py:f", r"nowhere\.py: no such file"),
        ("prompts=nowhere.jsonl", r"rejection\.reward: the task's cannot score files"),
    ],
)
def test_a_reward_that_is_not_there_is_told_before_any_work(override, message):
    with pytest.raises(InputError, match=message):
        preflight.check(recipe_of("rejection.threshold=null", f"rejection.{override}"))


def test_of_several_processes_one_calls_a_users_function(monkeypatch):
    called = posttraining._on_main(lambda *_: pytest.fail("this process called it, too"))
    monkeypatch.setattr(parallel, "on_main", lambda work, *, what: [9.0])  # as another one's
    assert called([], [], []) == [9.0]


def test_a_teacher_that_judges_must_be_there_first(run):
    recipe = recipe_of("rejection.reward=teacher:small", "rejection.threshold=null")
    preflight.check(recipe)
    _, stage = works(run(recipe))[context.REJECTION]
    assert stage.inputs == (context.CORPUS, context.SFT, "teachers/small")


@pytest.mark.slow
def test_a_reward_model_learns_from_a_file_and_judges_samples(
    run, tokenizer, tmp_path, monkeypatch
):
    asked, pairs = tmp_path / "asked.jsonl", tmp_path / "pairs.jsonl"
    asked.write_text(conversation("2 + 2?", "4"))
    records = [
        {"prompt": f"{a} + 2?", "chosen": "right", "rejected": "wrong, I think"} for a in range(24)
    ]
    pairs.write_text("\n".join(map(json.dumps, records)))

    def answer(model, tokenizer, problems, *, seeds, sharding, **_):
        assert sharding == parallel.batch_sharding(parallel.make_mesh())
        assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("bfloat16")}
        texts = ["wrong, I think", "right", "wrong, I think"] * len(problems)
        return [answers.Answer(text, tokenizer.encode(text), -1.0, True) for text in texts][
            : len(problems)
        ]

    monkeypatch.setattr(rejection, "answer", answer)
    recipe = alone(
        f"sft.data={asked}",
        f"reward_model.pairs={pairs}",
        "reward_model.sequence_length=64",
        "reward_model.held_out=0.3",
        f"rejection.prompts={asked}",
        "rejection.threshold=null",
        "rejection.samples=3",
    )
    config = recipe.posttraining
    config = dataclasses.replace(
        config,
        reward_train=dataclasses.replace(config.sft_train, steps=20),
        rejection=dataclasses.replace(config.rejection, reward="reward_model"),
        rejection_train=dataclasses.replace(config.sft_train, compute_dtype="bfloat16"),
    )
    recipe = dataclasses.replace(recipe, posttraining=config)
    preflight.check(recipe)
    made = works(run(recipe))
    assert list(made) == [context.SFT, context.REWARD, context.REJECTION]
    assert made[context.REJECTION][1].inputs == (context.CORPUS, context.SFT, context.REWARD)
    assert context.model_stages(recipe)[-2:] == [context.SFT, context.REJECTION]
    models.save(tmp_path / context.SFT, models.load(tmp_path / context.student(0)))
    place, stage = made[context.REWARD]
    figures = stage.work(place)
    assert figures["rows"] + figures["held_out_pairs"] == figures["used"] == 24
    assert figures["held_out_accuracy"] == 1
    lines = read_metrics(place / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"]
    drawn = {name for *_, metrics in report._LEARNT[context.REWARD] for name, _ in metrics}
    assert drawn < lines[0].keys()
    place, stage = made[context.REJECTION]
    stage.work(place)
    assert models.load(place).params["final_norm"].dtype == jnp.float32
    (record,) = read_samples(place / "samples")
    assert (record["chosen"], record["rejected"]) == (1, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejection.reward": "reward_model"}, r"rejection\.reward: needs the model of reward_tr"),
        ({"reward_train": True}, r"reward_model\.pairs: name files; nothing is sampled yet"),
    ],
)
def test_a_reward_model_needs_its_training_and_its_pairs(change, message):
    config = recipe_of().posttraining
    train = config.sft_train if "reward_train" in change else None
    reward = change.get("rejection.reward", "task")
    with pytest.raises(InputError, match=message):
        dataclasses.replace(
            config,
            reward_train=train,
            rejection=dataclasses.replace(config.rejection, reward=reward, threshold=None),
        )
