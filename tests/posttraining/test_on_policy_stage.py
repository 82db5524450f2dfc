"""On-policy distillation as a stage of a recipe."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from etils import epath

from distill_jax import data, models, parallel, stages
from distill_jax.artifacts import InputError
from distill_jax.recipe import Recipe, TokenizerConfig, load_recipe
from distill_jax.stages import context, posttraining, preflight, report
from distill_jax.training import read_metrics

TINY = pathlib.Path(__file__).parent.parent.parent / "configs" / "tiny.py"


def recipe_of(*overrides, method="gkd") -> Recipe:
    settings = [f"posttraining.{text}" for text in ("replay=0.0", *overrides)]
    return load_recipe(TINY, ["size=test", f"on_policy={method}", *settings])


def conversation(question, answer):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns})


@pytest.fixture
def files(tmp_path):
    """Conversations, and questions one of which is broken."""
    chats, asked = tmp_path / "chats.jsonl", tmp_path / "asked.jsonl"
    chats.write_text("\n".join(conversation(f"{a} + 2?", str(a + 2)) for a in range(5)))
    asked.write_text(
        "\n".join([conversation(f"{a} + 3?", "I do not know") for a in range(3)] + ["{"])
    )
    return chats, asked


@pytest.mark.slow
def test_a_recipe_lets_a_teacher_correct_its_student(
    files, tokenizer, random_model, tmp_path, monkeypatch
):
    chats, asked = files
    recipe = recipe_of(
        f"sft.data={chats}",
        f"on_policy.prompts={asked}",
        "on_policy.bad_rows=skip",
        "on_policy.student_share=0.5",
        "on_policy.max_new_tokens=5",
        "on_policy_train.steps=4",
    )
    preflight.check(recipe)
    tokenizer.save(tmp_path / context.CORPUS)
    for seed, stage in enumerate((context.SFT, "teachers/large")):
        models.save(tmp_path / stage, random_model(tokenizer.vocab_size, seed))
    one = parallel.make_mesh(parallel.MeshConfig(fsdp=1), jax.devices()[:1])
    monkeypatch.setattr(stages.Run, "mesh", one)
    run = stages.Run(recipe, epath.Path(tmp_path))
    made = {stage.name: stage for stage in posttraining.stages(run)}
    assert list(made) == ["sft", "on-policy", "rejection-sample", "dpo"]
    stage = made[context.ON_POLICY]
    assert stage.inputs == (context.CORPUS, context.SFT, "teachers/large")
    assert stage.external.keys() == {str(chats), str(asked)}
    assert made[context.REJECTION].inputs == (context.CORPUS, context.ON_POLICY)
    assert context.model_stages(recipe)[-4:] == list(made)
    assert report._POSTTRAINING.keys() == report._LEARNT.keys() == {*made, context.REWARD}

    place = run.directory / context.ON_POLICY
    place.mkdir()
    figures = stage.work(place)
    assert {name: figures[name] for name in ("used", "skipped", "prompts", "steps")} == {
        "used": 3, "skipped": 1, "prompts": 3, "steps": 4,
    }  # fmt: skip
    lines = read_metrics(place / "metrics.jsonl")
    ((_, _, drawn),) = report._LEARNT[context.ON_POLICY]
    assert [name for name, _ in drawn if name in lines[0]] == ["reverse_kl"]
    own = [line["student_sampled"] for line in lines]
    assert set(own) == {0.0, 1.0}
    # An answer that is given is a digit and the end of its turn.
    assert {line["answer_length"] for line in lines if not line["student_sampled"]} == {2.0}
    shown = [json.loads(line) for line in (place / "samples.jsonl").read_text().splitlines()]
    assert {line["step"] for line in shown} == {4 - own[::-1].index(1.0)}
    assert all(" + 3?" in line["prompt"] for line in shown)
    before, after = (models.load(tmp_path / name).params for name in ("sft", "on-policy"))
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, after)
    assert max(jax.tree.leaves(moved)) > 0
    assert data.load_tokenizer(place).chat_template is not None
    # Called again, as after a kill at the very end, it trains no more.
    monkeypatch.setattr(stages.Run, "loop", lambda *_, **__: pytest.fail("it trained again"))
    assert stage.work(place) == figures


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("teacher=nobody",), r"on_policy\.teacher: 'nobody' is none of the teachers large, small"),
        (("teacher=null",), r"posttraining\.on_policy\.teacher: name a teacher of the recipe"),
        (("prompts=",), r"posttraining\.on_policy\.prompts: no source"),
        (("prompts=nowhere.jsonl",), r"nowhere\.jsonl: no such file"),
        (("sequence_length=513",), r"on_policy\.sequence_length: 513 is more than the student's"),
        (("sequence_length=127",), r"127 is less than sft\.sequence_length 128"),
        (("rollout_rows=12",), r"rollout_rows: 12 is no multiple of on_policy_train\.batch_rows 8"),
        (("template=x",), r"sft\.template and on_policy\.template differ"),
        (('options={"beta": 1.5}',), r"posttraining\.on_policy: beta"),
        (('options={"alpha": 1}',), r"posttraining\.on_policy: .*unexpected keyword.*'alpha'"),
        (("student_share=-0.1",), r"student_share is -0\.1; it must be in \[0, 1\]"),
    ],
)
def test_what_does_not_fit_is_told_before_any_work(overrides, message):
    with pytest.raises(InputError, match=message) as caught:
        preflight.check(recipe_of(*(f"on_policy.{text}" for text in overrides)))
    assert "\n" not in str(caught.value)


def test_rows_files_and_contexts_are_told_before_any_work(files, tmp_path):
    with pytest.raises(InputError, match=r"posttraining\.on_policy_train\.batch_rows: 4 rows at"):
        preflight.check(recipe_of("on_policy_train.batch_rows=4"))
    with pytest.raises(InputError, match=r"asked\.jsonl: line 4: not JSON"):
        preflight.check(recipe_of(f"on_policy.prompts={files[1]}"))
    with pytest.raises(InputError, match=r"on_policy\.prompts: need those of posttraining\.task"):
        recipe_of("task=null", "rejection_train=null", "dpo_train=null", f"sft.data={files[0]}")
    recipe = recipe_of()
    large = recipe.teachers["large"]
    short = dataclasses.replace(large, shape=dataclasses.replace(large.shape, context=100))
    recipe = dataclasses.replace(recipe, teachers={**recipe.teachers, "large": short})
    with pytest.raises(InputError, match="128 is more than the context of 100 tokens that large"):
        preflight.check(recipe)


def test_prompts_that_are_too_long_are_told_where_the_tokenizer_is_known(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    recipe = recipe_of("on_policy.max_new_tokens=100")
    preflight.check(recipe)
    known = dataclasses.replace(recipe, tokenizer=TokenizerConfig(source=str(tmp_path)))
    with pytest.raises(InputError, match=r"on_policy\.prompts: a prompt of \d+ tokens, 100 more"):
        preflight.check(known)


def test_a_recipe_without_it_has_no_such_stage():
    recipe = load_recipe(TINY, ["size=test"])
    assert context.ON_POLICY not in context.posttraining_stages(recipe)
    assert "on-policy" in stages.COMMANDS
    minillm = recipe_of("on_policy.temperature=1.0", method="minillm").posttraining.on_policy
    assert (minillm.method, minillm.text_weight) == ("minillm", 1.0)
