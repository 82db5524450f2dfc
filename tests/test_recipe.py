import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from teachers import known

from distill_jax import losses, models, pruning, teachers
from distill_jax.artifacts import InputError
from distill_jax.recipe import (
    Round,
    TeacherConfig,
    Term,
    TokenizerConfig,
    load_recipe,
    to_json,
)
from distill_jax.stages import Run, preflight, report, students
from distill_jax.stages.context import stored_teachers

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
TINY = CONFIGS / "tiny.py"


def test_a_parameter_of_get_config_and_fields_by_dotted_name():
    recipe = load_recipe(
        TINY,
        [
            "size=test",
            "distill.train.steps=7",
            "distill.train.optimizer.learning_rate=2e-4",
            "distill.terms.large.divergence=reverse_kl",
            "distill.terms.large.targets=top_k",
            "targets.schemes.top_k.k=9",
            "teachers.small.train.batch_rows=16",
            "corpus.out_of_domain=null",
            "seeds=[3, 4]",
            "name=mine",
        ],
    )
    plain = load_recipe(TINY, ["size=test"])
    assert recipe.distill.train.steps == 7
    assert recipe.distill.train.optimizer.learning_rate == 2e-4
    assert recipe.distill.terms["large"].divergence == "reverse_kl"
    assert recipe.targets.schemes["top_k"].k == 9
    assert recipe.teachers["small"].train.batch_rows == 16
    assert recipe.corpus.out_of_domain is None
    assert recipe.seeds == (3, 4)
    assert recipe.name == "mine"
    assert recipe.posttraining == plain.posttraining
    assert recipe.prune.target == plain.prune.target


def test_fields_inside_of_a_tuple_are_named_by_their_place():
    plain = load_recipe(TINY, ["posttraining_rounds=3"])
    sets = ("posttraining_rounds.1.dpo.beta=0.7", "posttraining_rounds.1.averaged=2", "seeds.0=5")
    changed = load_recipe(TINY, ["posttraining_rounds=3", *sets])
    first, second = changed.posttraining_rounds
    assert first == plain.posttraining_rounds[0]
    assert (second.dpo.beta, second.averaged, changed.seeds) == (0.7, 2, (5,))
    assert second.rejection == plain.posttraining_rounds[1].rejection
    assert changed.posttraining == plain.posttraining


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("posttraining_rounds.1.averaged=2", r"\.1: unknown field '1'; known: 0"),
        ("controls.0=nonsense", r"controls\.0=nonsense: .*'cross_entropy'"),
        ("distill.terms.large.options.alpha=much", r"options\.alpha: unknown field"),
        ("posttraining_rounds=0", "posttraining_rounds is 0; there is at least one"),
    ],
)
def test_wrong_items_are_refused(override, message):
    with pytest.raises(InputError, match=message):
        load_recipe(TINY, ["posttraining_rounds=2", override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill.train.stepz=3", r"unknown field 'stepz'; did you mean 'steps'\?"),
        ("distil.train.steps=3", r"unknown field 'distil'; did you mean 'distill'\?"),
        ("teachers.huge.train=null", "unknown field 'huge'; known: large, small"),
        ("distill.train.steps=many", "--set distill.train.steps=many: .*integer"),
        ("distill.train.steps=1.5", "--set distill.train.steps=1.5: .*integer"),
        ("distill.train.steps=0", "TrainConfig.steps is 0; it must be positive"),
        ("distill.train.steps.more=1", "nothing below 'distill.train.steps'"),
        ("distill.train.remat=some", "--set distill.train.remat=some: .*'none'"),
        ("size=huge", "--set size=huge: .*'default'"),
        (
            "distill.terms.large.divergence=nonsense",
            "'nonsense' is none of the divergences adaptive_kl",
        ),
        ("distill.terms.large.targets=nowhere", "'nowhere' is none of the stores"),
        ("pruned_teacher=nobody", "pruned_teacher: 'nobody' is none of"),
        ("targets.schemes={}", "cannot be set as a whole"),
        ("steps", "write it as name=value"),
        ("distill.train.steps=true", "--set distill.train.steps=true: .*integer"),
        ("seeds=[0, 0]", "are not distinct numbers from 0 on"),
        ("seeds=[-1]", "are not distinct numbers from 0 on"),
        ("distill.train.optimizer.learning_rate=-1", "learning_rate is -1"),
        ("distill.hard_weight=-1.0", "distill.hard_weight is -1.0"),
    ],
)
def test_wrong_overrides_are_told_in_one_line(override, message):
    with pytest.raises(InputError, match=message) as caught:
        load_recipe(TINY, [override])
    assert "\n" not in str(caught.value)


def test_wrong_files_are_told(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_recipe(tmp_path / "none.py")
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(InputError, match="has no function get_config"):
        load_recipe(tmp_path / "empty.py")
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    with pytest.raises(InputError, match=r"broken\.py: SyntaxError"):
        load_recipe(tmp_path / "broken.py")


def test_mistakes_in_get_config_are_told(tmp_path):
    (tmp_path / "wrong.py").write_text("def get_config():\n    return dict(nme=1) + 1\n")
    with pytest.raises(InputError, match=r"wrong\.py: TypeError: "):
        load_recipe(tmp_path / "wrong.py")
    (tmp_path / "nothing.py").write_text("def get_config():\n    pass\n")
    with pytest.raises(InputError, match="get_config returned NoneType, not a Recipe"):
        load_recipe(tmp_path / "nothing.py")


def test_fields_that_must_agree_change_together():
    lengths = ["corpus.sequence_length=64", "posttraining.sft.sequence_length=64"]
    for overrides in (lengths, lengths[::-1]):
        recipe = load_recipe(TINY, overrides)
        assert recipe.corpus.sequence_length == recipe.posttraining.sft.sequence_length == 64
    whole = ["posttraining=null", "posttraining.replay=0.1"]
    for overrides in (whole, whole[::-1]):
        with pytest.raises(InputError, match=r"set as a whole, too|its fields are set, too"):
            load_recipe(TINY, overrides)


def test_replayed_rows_must_fit():
    with pytest.raises(InputError, match=r"replay is 1\.0; it must be in \[0, 1\)"):
        load_recipe(TINY, ["posttraining.replay=1.0"])
    with pytest.raises(InputError, match=r"have 128 tokens, .*sequence_length is 64"):
        load_recipe(TINY, ["posttraining.sft.sequence_length=64"])


def test_exactly_one_start():
    with pytest.raises(InputError, match="exactly one of source, teacher and shape"):
        TeacherConfig(source="a", teacher="b")
    with pytest.raises(InputError, match="either source or vocab_size"):
        TokenizerConfig()


def test_json_tells_schemes_apart():
    described = to_json(load_recipe(TINY))
    assert described["targets"]["schemes"]["top_k"] == {"k": 16, "name": "top_k"}
    samples = {"tau": 0.04, "ids": None, "name": "threshold"}
    assert described["targets"]["schemes"]["samples"] == samples
    changed = to_json(load_recipe(TINY, ['distill.terms.small.options={"alpha": 0.2}']))
    assert changed["distill"] != described["distill"]


def test_the_objective_is_the_weighted_sum_of_the_terms():
    recipe = load_recipe(TINY, ["distill.terms.small.divergence=reverse_kl"])
    logits = {name: np.random.default_rng(i).normal(size=(5, 7)) for i, name in enumerate("sab")}
    targets = {"labels": jnp.arange(5), "small": logits["a"], "large": logits["b"]}
    loss, terms = recipe.distill.objective(1.0)(logits["s"], targets)
    hard = losses.cross_entropy(logits["s"], jnp.arange(5))
    small = losses.reverse_kl(logits["s"], logits["a"])
    large = losses.forward_kl(logits["s"], logits["b"])
    np.testing.assert_allclose(loss, 0.1 * hard + 0.2 * small + 0.7 * large, rtol=1e-6)
    np.testing.assert_allclose(terms["hard"], hard)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prune.target.layers=9", "layers"),
        ("prune.target.embed=512", "embed"),
        ("prune.target.kv_heads=3", "kv_heads"),
        ("prune.target.heads=3", "not a multiple of kv_heads"),
        ("corpus.source=nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("mesh.data=3", "does not arrange 8 devices"),
        ("mesh.data=0", "does not arrange 8 devices"),
        (
            "divergence=reverse_kl; distill.terms.large.targets=samples",
            r"distill\.terms\.(large|small)\.targets: reverse_kl needs a top-k store",
        ),
        ("distill.terms.large.divergence=weighted_sum", "distill.terms: "),
        ('distill.terms.large.options={"nonsense": 1}', "distill.terms: .*nonsense"),
        ("targets.schemes.top_k.k=99999", "99999"),
        ("distill.train.batch_rows=4", "distill.train.batch_rows: 4 rows .* 8 devices"),
        ("evaluation.batch_rows=6", "evaluation.batch_rows: 6 rows .* 8 devices"),
        (
            "mesh.sequence=2; posttraining.dpo_train.batch_rows=4",
            "posttraining.dpo_train.batch_rows: 4 rows .* 8 devices",
        ),
        (
            "mesh.sequence=8; corpus.sequence_length=120; posttraining.replay=0",
            "corpus.sequence_length: 120 tokens do not divide .* 8 devices of mesh.sequence",
        ),
        (
            "mesh.sequence=8; posttraining.sft.sequence_length=120; posttraining.replay=0",
            "posttraining.sft.sequence_length: 120 tokens do not divide",
        ),
        ("prune.target.embed=90", "90"),
        ("corpus.train_rows=4", "teachers.large.train.batch_rows: a batch has 8 rows, .* is 4"),
        ('prompts=[""]', "prompts: one is empty"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(override, message):
    with pytest.raises(InputError, match=message) as caught:
        preflight.check(load_recipe(TINY, override.split("; ")))
    assert "\n" not in str(caught.value)


def test_devices_that_share_rows_need_fewer():
    sharing = ("targets.write", "evaluation", "distill.train", "posttraining.sft_train")
    rows = [f"{name}.batch_rows=4" for name in sharing]
    preflight.check(load_recipe(TINY, ["mesh.sequence=2", *rows]))


@pytest.mark.parametrize(
    ("name", "parameters"), [("llama3_2_1b", 1_235_814_400), ("llama3_2_3b", 3_212_749_824)]
)
def test_llama_recipes_have_the_published_shapes(name, parameters):
    recipe = load_recipe(CONFIGS / f"{name}.py")
    abstract = models.abstract_params(recipe.prune.target)
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == parameters


def test_a_divergence_chooses_the_store_that_can_give_it():
    def store(*overrides):
        return load_recipe(TINY, ["size=test", *overrides]).store("large")

    assert store() == "samples"
    assert store("divergence=reverse_kl") == "top_k"
    assert store("distill.terms.large.targets=top_k") == "top_k"
    with pytest.raises(InputError, match=r"distill\.terms\.large\.targets: 'x' is none of"):
        store("distill.terms.large.targets=x")


def test_of_a_teacher_that_only_corrects_answers_nothing_is_stored():
    recipe = load_recipe(TINY, ["size=test", "on_policy=gkd"])
    assert stored_teachers(recipe) == ["large", "small"]
    terms = {"small": recipe.distill.terms["small"]}
    distill = dataclasses.replace(recipe.distill, terms=terms)
    assert stored_teachers(dataclasses.replace(recipe, distill=distill)) == ["small"]


def test_a_store_that_keeps_something_else_than_the_recipe_says_is_refused(tmp_path):
    def write(recipe, scheme):
        teacher, corpus = known.make_teacher(), known.make_corpus(2)
        for name in recipe.teachers:
            figures = teachers.write_stores(
                {scheme: tmp_path / "targets" / name / "samples"},
                {scheme: recipe.targets.schemes[scheme]},
                teacher.model,
                corpus,
                hidden_states=teacher.hidden_states,
            )
            manifest = tmp_path / "targets" / name / "manifest.json"
            manifest.write_text(json.dumps({"figures": figures}))

    recipe = load_recipe(TINY, ["size=test"])
    run = Run(recipe, epath.Path(tmp_path))
    with pytest.raises(InputError, match="targets/large: this stage has not been run to its end"):
        students.open_stores(run, "distill")
    write(recipe, "samples")
    assert students.open_stores(run, "distill").keys() == {"large", "small"}
    manifest = tmp_path / "targets" / "large" / "manifest.json"
    manifest.write_text(json.dumps({"figures": {"samples": {"teacher": "another"}}}))
    with pytest.raises(InputError, match=r"large/samples is of the teacher \w+, .*json of another"):
        students.open_stores(run, "distill")
    shutil.rmtree(tmp_path / "targets")
    write(recipe, "top_k")
    expected = (
        r"teacher large: .*samples has TopK\(k=16\), the recipe Threshold\(tau=0.04, ids=None"
    )
    with pytest.raises(InputError, match=expected):
        students.open_stores(run, "distill")


@pytest.mark.parametrize("divergence", losses.DIVERGENCES)
def test_any_divergence_by_one_line(divergence):
    recipe = load_recipe(TINY, ["size=test", f"divergence={divergence}"])
    preflight.check(recipe)
    assert {term.divergence for term in recipe.distill.terms.values()} == {divergence}


def test_the_chain_leads_from_8b_over_3b_to_1b():
    recipe = load_recipe(CONFIGS / "llama3_2_chain.py")
    shapes = [*(one.prune.target for one in recipe.rounds), recipe.prune.target]
    # The published 3B, and eight heads more: 28 layers of 2 * 3072 * 8 * 128 weights.
    assert [shape.parameters for shape in shapes] == [3_212_749_824 + 176_160_768, 1_235_814_400]
    assert list(recipe.trainings) == ["rounds.0.distill", "distill"]
    source = models.LLAMA_3_1_8B
    for shape in shapes:
        pruning.check_shapes(source, shape)
        source = shape


def rounds(**changes):
    """The tiny recipe with two rounds before its last, the second changed."""
    recipe = load_recipe(TINY, ["size=test"])
    target = dataclasses.replace(recipe.prune.target, layers=4, embed=112, mlp=320)
    first = Round(prune=dataclasses.replace(recipe.prune, target=target), distill=recipe.distill)
    second = dataclasses.replace(first, **changes)
    return dataclasses.replace(recipe, rounds=(first, second))


def test_wrong_rounds_are_refused_before_any_work():
    preflight.check(rounds())
    prune, distill = rounds().rounds[0].prune, rounds().distill
    larger = dataclasses.replace(prune, target=dataclasses.replace(prune.target, mlp=321))
    with pytest.raises(InputError, match=r"mlp is 321, larger than the source's 320"):
        preflight.check(rounds(prune=larger))
    narrow = dataclasses.replace(prune, target=dataclasses.replace(prune.target, mlp=255))
    with pytest.raises(InputError, match=r"mlp is 256, larger than the source's 255"):
        preflight.check(rounds(prune=narrow))
    unknown = dataclasses.replace(distill, terms={"nobody": Term(weight=1.0)})
    with pytest.raises(InputError, match=r"rounds\.1\.distill\.terms: 'nobody' is none of"):
        rounds(distill=unknown)
    terms = {"large": Term(weight=1.0, divergence="reverse_kl", targets="samples")}
    with pytest.raises(InputError, match=r"rounds\.1\.distill\.terms\.large\.targets: reverse_kl"):
        rounds(distill=dataclasses.replace(distill, terms=terms))
    few = dataclasses.replace(distill, train=dataclasses.replace(distill.train, batch_rows=4))
    with pytest.raises(InputError, match=r"rounds\.1\.distill\.train\.batch_rows: 4 rows"):
        preflight.check(rounds(distill=few))


def test_each_round_starts_from_the_student_of_the_one_before(tmp_path):
    made = students.stages(Run(rounds(), epath.Path(tmp_path)))
    reads = {stage.name: stage.inputs[1] for stage in made if "controls" not in stage.name}
    assert reads == {
        "rounds/0/prune": "teachers/large",
        "rounds/0/distill": "rounds/0/prune",
        "rounds/1/prune": "rounds/0/distill",
        "rounds/1/distill": "rounds/1/prune",
        "prune": "rounds/1/distill",
        "distill/seed-0": "prune",
    }
    stored = {"targets/large", "targets/small"}
    assert all(stored <= {*stage.inputs} for stage in made if stage.name.endswith("/distill"))


def test_the_report_reads_the_rounds(tmp_path):
    (stage,) = report.stages(Run(rounds(), epath.Path(tmp_path)))
    assert {"rounds/0/prune", "rounds/0/distill", "rounds/1/prune", "rounds/1/distill"} <= {
        *stage.inputs
    }
