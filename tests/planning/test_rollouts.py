"""On-policy distillation as it is planned, and as it runs."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from drawn import drawn_params

from distill_jax import models, parallel
from distill_jax.artifacts import InputError
from distill_jax.models import decoding
from distill_jax.planning import Choice, rollouts
from distill_jax.posttraining import Example, Rollouts
from distill_jax.posttraining import rollouts as running
from distill_jax.recipe import load_recipe
from planning.test_programs import TINY, Spied, described, programs, same


def recipe_of(method, *overrides):
    return load_recipe(TINY, ["size=test", f"on_policy={method}", *overrides])


def alike(planned, given):
    """As `same`; where the next token goes is a number that any may be."""
    return isinstance(given, int) if isinstance(planned, int) else same(planned, given)


def names(planned):
    return [program.name.removeprefix("on-policy").strip() for program in planned]


def test_who_writes_and_who_reads_is_planned():
    """16 slots for each prompt of 116 tokens and 32 more for 12 new ones: 128 and 160."""
    writes = ["layout", "read 128", "write 160"]
    assert names(programs(recipe_of("gkd"), "on-policy")) == [*writes, ""]
    scores = ["score by the student", "score by the teacher"]
    assert names(programs(recipe_of("minillm"), "on-policy")) == [*writes, *scores, ""]
    given = recipe_of("gkd", "posttraining.on_policy.student_share=0")
    assert names(programs(given, "on-policy")) == [""]
    long = recipe_of("gkd", "posttraining.on_policy.sequence_length=1024",
                     "posttraining.on_policy.max_new_tokens=900")  # fmt: skip
    assert names(programs(long, "on-policy"))[2:-1] == [
        f"write {slots}" for slots in (256, 384, 512, 768, 1024)
    ]


def test_the_step_of_on_policy_distillation_counts_what_it_reads_beside():
    """The teacher forward; the student's text, of the corpus, once more."""
    recipe = recipe_of("minillm")
    step = programs(recipe, "on-policy", choice=Choice(batch=2))[-1]
    teacher, student = recipe.teachers["large"].shape, recipe.prune.target
    student = dataclasses.replace(student, vocab_size=512)
    of_row = 128 * (6 * student.flops_per_token(128) + teacher.flops_per_token(128))
    assert (step.rows, step.tokens, step.flops) == (16, 16 * 128, 16 * of_row)
    assert step.total_tokens == 4 * 8 * 128
    assert step.held["teachers"].keys() == {"teacher"}


def test_what_waits_beside_the_writing_is_counted():
    """The state of the training, and a teacher who does not write."""
    for method, apart in (("gkd", True), ("minillm", False)):
        *_, written, step = (p for p in programs(recipe_of(method), "on-policy")
                             if p.name[:15] in ("on-policy write", "on-policy"))  # fmt: skip
        state = written.held["training"]
        assert described(state[0]) == described(step.held["parameters"])
        assert bool(written.held["teacher"]) == apart
        assert len(written.held["parameters"]) == (1 if apart else 2)
        assert written.turns == 1


def test_a_recipe_without_on_policy_distillation_is_refused():
    recipe = load_recipe(TINY, ["size=test"])
    with pytest.raises(InputError, match=r"posttraining\.on_policy_train: the recipe has none"):
        programs(recipe, "on-policy")
    with pytest.raises(InputError, match="posttraining: the recipe has none"):
        programs(dataclasses.replace(recipe, posttraining=None), "on-policy")
    few = recipe_of("gkd", "posttraining.on_policy_train.batch_rows=4")
    with pytest.raises(
        InputError, match=r"posttraining\.on_policy_train\.batch_rows / accumulation"
    ):
        programs(few, "on-policy")


@pytest.mark.slow
def test_the_programs_that_are_planned_are_those_that_run(monkeypatch):
    """A round of MiniLLM on eight devices, whose prompts are as long as they may be."""
    small = models.LlamaConfig(
        vocab_size=64, embed=16, mlp=16, layers=2, heads=4, kv_heads=2, head_dim=4, tied=False
    )
    recipe = recipe_of("minillm", "posttraining.on_policy.sequence_length=32")
    recipe.teachers["large"] = dataclasses.replace(recipe.teachers["large"], shape=small)
    recipe = dataclasses.replace(
        recipe,
        prune=dataclasses.replace(recipe.prune, target=small),
        tokenizer=dataclasses.replace(recipe.tokenizer, vocab_size=64),
    )
    config, train = recipe.posttraining.on_policy, recipe.posttraining.on_policy_train
    assert config.mixed
    setting = parallel.MeshConfig(data=2, fsdp=2, tensor=2)
    planned = programs(recipe, "on-policy", choice=Choice(mesh=setting))
    mesh = planned[0].mesh
    spies = {name: Spied(getattr(decoding, name)) for name in ("arrange", "read", "extend")}
    for name, spy in spies.items():
        monkeypatch.setattr(decoding, name, spy)
    spies["score"] = Spied(running.score_rows)
    monkeypatch.setattr(rollouts, "score_rows", spies["score"])
    monkeypatch.setattr(running, "score_rows", spies["score"])
    for program in planned[:-1]:
        program.lower()
    random = np.random.default_rng(0)
    prompts = random.integers(3, 64, (8, 20)).tolist()
    text = [{"tokens": np.full(128, 5, np.int32), "segment_ids": np.ones(128, np.int32)}]
    teacher = models.Model(small, jax.device_put(drawn_params(small, 1)))
    monkeypatch.setattr(running, "stop_ids", lambda *_: (1, 2))
    tokenizer = types.SimpleNamespace(pad_id=0)
    batches = Rollouts(
        small, teacher, tokenizer, config, train, prompts,
        conversations=[Example([4, 2], [False, True])], text=text * 8, mesh=mesh,
    )  # fmt: skip
    params = drawn_params(small)
    places = parallel.shardings(mesh, models.logical_axes(small), params)
    batches.draw(jax.device_put(params, places), 1)
    for name, spy in spies.items():
        assert spy.lowered, name
        for wanted in spy.lowered:
            found = [
                jax.tree.structure(wanted) == jax.tree.structure(args)
                and all(map(alike, jax.tree.leaves(wanted), jax.tree.leaves(args)))
                for args in spy.called
            ]
            assert any(found), name
    batch = jax.device_put(next(batches))
    assert described(planned[-1].held["batch"]) == described(batch)
