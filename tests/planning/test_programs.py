import dataclasses
import functools
import pathlib
import re

import jax
import numpy as np
import pytest
from drawn import drawn_params
from jax.sharding import PartitionSpec
from teachers import known

from distill_jax import (
    data,
    losses,
    models,
    parallel,
    planning,
    posttraining,
    pruning,
    teachers,
    training,
)
from distill_jax.artifacts import InputError
from distill_jax.models import presets
from distill_jax.planning import Choice, cuts
from distill_jax.planning.shapes import known_teachers, student_shape
from distill_jax.pruning import least_squares, steps
from distill_jax.pruning.importance import random_scores
from distill_jax.recipe import load_recipe
from distill_jax.teachers import RandomSampling, Threshold, TopK

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
TINY, ONE_B = str(CONFIGS / "tiny.py"), str(CONFIGS / "llama3_2_1b.py")
TEACHER = models.LlamaConfig(
    vocab_size=512, embed=8, mlp=8, layers=1, heads=2, kv_heads=1, head_dim=4, tied=True
)


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(TINY, ["size=test"])


def programs(recipe, stage, **options):
    choice = options.pop("choice", Choice())
    return planning.stage_programs(recipe, stage, choice, jax.devices(), **options)


def tiny_scores(shape):
    return pruning.Scores(**random_scores(shape, 1), method="", model="", rows="")


def described(tree):
    return jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), tree)


@pytest.mark.parametrize("scheme", [TopK(k=4), Threshold(tau=0.2), Threshold(ids=3),
                                    RandomSampling(draws=6)], ids=repr)  # fmt: skip
def test_a_blank_row_is_like_a_stores(scheme, tmp_path):
    corpus = known.make_corpus(3)
    table = np.random.default_rng(0).normal(size=(known.VOCAB, known.VOCAB)).astype(np.float32)
    teacher = known.TableTeacher(table)
    teachers.write_stores(
        {"s": tmp_path / "s"}, {"s": scheme}, teacher.model, corpus,
        hidden_states=teacher.hidden_states,
    )  # fmt: skip
    store = teachers.open_store(tmp_path / "s")
    row, blank = store[0]["targets"], teachers.blank_row(scheme, known.TIME, known.VOCAB)
    assert row.keys() == blank.keys()
    for name, array in row.items():
        wide = (*array.shape[:1], scheme.width) if array.ndim == 2 else array.shape
        assert (blank[name].shape, blank[name].dtype) == (wide, array.dtype), name


def test_distill_is_called_with_what_the_data_gives(recipe):
    """Against batches that the data pipeline makes of stored rows of the same schemes."""
    (program,) = programs(recipe, "distill", choice=Choice(batch=2))
    length = recipe.corpus.sequence_length
    row = {
        "row_id": 7,
        "key": "text",
        "tokens": np.ones(length, np.int32),
        "segment_ids": np.ones(length, np.int32),
        "targets": {
            name: teachers.blank_row(recipe.targets.schemes["samples"], length, 512)
            for name in ("large", "small")
        },
    }
    batch = next(data.batches([row] * 16, batch_rows=16, seed=0))
    placed = jax.device_put(batch, program.held["batch"]["tokens"].sharding)
    assert described(program.held["batch"]) == described(placed)
    assert program.rows == 16
    assert program.tokens == 16 * length
    # 8 steps of 8 rows, whatever the batch is now
    assert program.total_tokens == 8 * 8 * length
    shape, _ = student_shape(recipe)
    assert program.flops == 3 * shape.flops_per_token(length) * 16 * length
    assert described(program.held["parameters"]) == described(models.abstract_params(shape))
    state = jax.eval_shape(
        training.make_optimizer(recipe.distill.train.optimizer, 8, models.logical_axes(shape)).init,
        models.abstract_params(shape),
    )
    assert described(program.held["optimizer"]) == described(state)


@pytest.mark.slow
def test_the_step_that_is_lowered_is_the_one_that_trains(tmp_path):
    """Trains a step with `training.train`: one more call of what it jits compiles nothing new."""
    small = TEACHER
    config = training.TrainConfig(steps=1, batch_rows=8)
    loss_fn = training.language_model_loss(small, losses.hard_labels(), mesh=None)
    rows = [{"tokens": np.arange(16, dtype=np.int32), "segment_ids": np.ones(16, np.int32)}] * 8
    jitted = training.jit_step(
        models.abstract_params(small), models.logical_axes(small), loss_fn, config,
        parallel.make_mesh(),
    )  # fmt: skip
    batch = next(data.batches(rows, batch_rows=8, seed=0))
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jitted.rows), batch
    )
    text = jitted.function.lower(jitted.state, like).as_text()
    model = models.Model(small, jax.device_put(drawn_params(small)))
    seen = {}

    def spied(params, batch, step):
        seen["batch"] = described(batch)
        seen["params"] = described(params)
        return loss_fn(params, batch, step)

    training.train(model, spied, data.batches(rows, batch_rows=8, seed=0), config, tmp_path)
    assert seen["batch"] == described(like)
    assert seen["params"] == described(jitted.state.params)
    assert "sharding" in text


@pytest.mark.slow
def test_post_training_is_called_with_what_its_rows_hold(recipe):
    tokens = posttraining.Example([1, 2, 3], [False, True, True])
    rows = posttraining.pack([tokens], 128)
    (program,) = programs(recipe, "sft", choice=Choice(batch=1))
    made = next(data.batches(rows * 8, batch_rows=8, seed=0))
    assert described(program.held["batch"]) == described(jax.device_put(made))

    config = recipe.posttraining.dpo
    model = models.Model(TEACHER, jax.device_put(drawn_params(TEACHER)))
    pairs = posttraining.pair_rows([posttraining.Pair([1, 2], [3], [4, 5])], config)
    rows = posttraining.with_reference(model, pairs, config, pairs_per_batch=1)
    (program,) = programs(recipe, "dpo", choice=Choice(batch=2))
    made = next(data.batches(rows * 16, batch_rows=16, seed=0))
    assert described(program.held["batch"]) == described(jax.device_put(made))
    assert program.tokens == 16 * 2 * 128


@pytest.mark.parametrize(
    "stage",
    [
        *("distill", "targets", "sft"),
        *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("prune", "on-policy", "dpo")),
    ],
)
def test_every_stage_can_be_traced_on_devices_that_are_here(stage):
    recipe = load_recipe(TINY, ["size=test", "on_policy=gkd"])
    mesh = parallel.MeshConfig(data=2, fsdp=2, tensor=2)
    moves = ("prune cut", "prune tie", "on-policy layout")
    for program in programs(recipe, stage, choice=Choice(batch=1, mesh=mesh)):
        lowered = program.lower()
        assert "module" in lowered.as_text()[:20]
        assert (program.flops > 0) == (program.name not in moves)
        leaves = jax.tree.leaves(program.held)
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


class Spied:
    """A jitted function that notes what it is called with, and what it is lowered for."""

    def __init__(self, function):
        self.function, self.called, self.lowered = function, [], []

    def __call__(self, *args):
        self.called.append(args)
        return self.function(*args)

    def lower(self, *args):
        self.lowered.append(args)
        return self.function.lower(*args)


def same(planned, given):
    """Whether arguments are alike in shape, type and place; index arrays may hold other numbers."""
    if isinstance(planned, jax.ShapeDtypeStruct):
        alike = (planned.shape, planned.dtype) == (given.shape, given.dtype)
        return alike and planned.sharding.is_equivalent_to(given.sharding, given.ndim)
    if isinstance(planned, float):
        return isinstance(given, float)
    if isinstance(planned, np.ndarray):
        return planned.shape == given.shape
    return planned == given


@pytest.mark.slow
def test_the_steps_of_a_repair_that_are_planned_are_those_that_run(recipe, monkeypatch):
    """With eight devices, which must repair as one does."""
    names = ("full_layer", "heads", "neurons", "writer_sums", "reader_sums", "read")
    spies = {name: Spied(getattr(steps, name)) for name in names}
    fits = Spied(cuts.solve)
    mesh = parallel.MeshConfig(fsdp=4, tensor=2)
    wide = models.LlamaConfig(
        vocab_size=64, embed=32, mlp=48, layers=3, heads=4, kv_heads=2, head_dim=8, tied=False
    )
    target = dataclasses.replace(wide, embed=16, mlp=24, layers=2)
    teacher = dataclasses.replace(recipe.teachers["large"], shape=wide)
    prune = dataclasses.replace(recipe.prune, target=target, calibration_rows=16)
    small = dataclasses.replace(
        recipe,
        teachers={**recipe.teachers, "large": teacher},
        pruned_teacher="large",
        prune=prune,
        tokenizer=dataclasses.replace(recipe.tokenizer, vocab_size=64),
    )
    planned = programs(small, "prune", choice=Choice(batch=2, mesh=mesh))
    assert [program.name.removeprefix("prune ") for program in planned] == [
        *("scores", "cut", "repair layer", "repair heads", "repair neurons", "repair sums"),
        *("repair fit", "repair read sums", "repair read"),
    ]
    for name, spy in spies.items():
        monkeypatch.setattr(steps, name, spy)
    monkeypatch.setattr(cuts, "solve", fits)
    monkeypatch.setattr(least_squares, "solve", fits)
    for program in planned[2:]:
        program.lower()
    devices = planned[0].mesh
    params = drawn_params(wide)
    places = parallel.shardings(devices, models.logical_axes(wide), params)
    length = small.corpus.sequence_length
    tokens = np.random.default_rng(0).integers(0, 64, (2, 8, length), dtype=np.int32)
    batches = [{"tokens": rows} for rows in tokens]
    plan = pruning.make_plan(tiny_scores(wide), wide, target)
    run = functools.partial(pruning.repair_in_sequence, plan, batches=batches)
    eight = run(models.Model(wide, jax.device_put(params, places)), mesh=devices)
    for name, spy in {**spies, "solve": fits}.items():
        (wanted,) = spy.lowered
        found = [
            jax.tree.structure(wanted) == jax.tree.structure(args)
            and all(map(same, jax.tree.leaves(wanted), jax.tree.leaves(args)))
            for args in spy.called
        ]
        assert any(found), name
    held = planned[2].held
    assert described(held["student"][0]) == described(eight)
    monkeypatch.undo()
    one = run(models.Model(wide, params))
    hidden = [models.logits(target, tree, tokens[0]) for tree in (one, eight)]
    np.testing.assert_allclose(*hidden, atol=2e-3)


def test_every_round_of_a_chain_is_planned():
    """Only the first makes one matrix of two; the second cuts what the first leaves."""
    recipe = load_recipe(str(CONFIGS / "llama3_2_chain.py"))
    planned = {p.name: p for p in programs(recipe, "prune", choice=Choice(batch=1))}
    first = [name.removeprefix("round 0 ") for name in planned if name.startswith("round 0 ")]
    last = [name for name in planned if name.startswith("prune ")]
    assert [name for name in first if "tie" not in name] == last
    assert [name for name in first if "tie" in name] == ["prune tie sums", "prune tie"]
    assert len(planned) == len(first) + len(last)
    shapes = presets.LLAMA_3_1_8B, recipe.rounds[0].prune.target
    for name, shape in zip(("round 0 prune cut", "prune cut"), shapes, strict=True):
        assert described(planned[name].held["parameters"]) == described(
            models.abstract_params(shape)
        )


def test_the_recipes_own_choice_is_kept_and_others_are_made(recipe):
    (program,) = programs(recipe, "distill")
    assert (program.rows, program.batch, program.remat) == (8, 1, "none")
    mesh = parallel.MeshConfig(data=2, tensor=2)
    choice = Choice(batch=3, remat="dots", mesh=mesh)
    (program,) = programs(recipe, "distill", choice=choice)
    assert (program.rows, program.batch, program.remat) == (12, 3, "dots")
    sizes = {"data": 2, "fsdp": 2, "fsdp_minor": 1, "sequence": 1, "tensor": 2}
    assert dict(program.mesh.shape) == sizes
    assert any("a batch has 12 rows, the recipe's 8" in note for note in program.notes)


def test_devices_that_share_rows_have_fewer_tokens():
    """But not in preferences, which need whole rows."""
    choice = Choice(batch=3, mesh=parallel.MeshConfig(fsdp=2, sequence=4))
    recipe = load_recipe(TINY, ["size=test", "on_policy=gkd"])
    stages = ("targets", "distill", "sft", "on-policy", "dpo")
    for stage, rows in zip(stages, (6, 6, 6, 6, 24)):
        *_, program = programs(recipe, stage, choice=choice)
        assert (program.rows, program.batch) == (rows, 3)


def test_cuts_fill_their_batches_up_as_the_stage_does(recipe):
    few = load_recipe(TINY, ["size=test", "evaluation.batch_rows=4"])
    assert {program.rows for program in programs(few, "prune") if program.tokens} == {8}


def test_forward_passes_cost_a_third(recipe):
    (writing,) = programs(recipe, "targets", choice=Choice(batch=2))
    assert writing.name == "targets large"
    shape = recipe.teachers["large"].shape
    length = recipe.corpus.sequence_length
    assert writing.flops == shape.flops_per_token(length) * 16 * length
    assert writing.total_tokens == 48 * length
    (small,) = programs(recipe, "targets", choice=Choice(batch=2), teacher="small")
    assert small.flops < writing.flops


@pytest.mark.parametrize(
    ("stage", "choice", "message"),
    [
        ("distill", Choice(mesh=parallel.MeshConfig(data=3)), "does not arrange 8 devices"),
        ("distill", Choice(mesh=parallel.MeshConfig(data=16)), "does not arrange 8 devices"),
        ("targets", Choice(), "targets.write.batch_rows: 12 rows at a time do not divide over 8"),
    ],
)
def test_what_does_not_divide_is_refused(stage, choice, message):
    changed = load_recipe(TINY, ["size=test", "targets.write.batch_rows=12"])
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        programs(changed, stage, choice=choice)
    assert "\n" not in str(caught.value)


def test_other_wrong_inputs_are_refused(recipe):
    with pytest.raises(InputError, match="--teacher: 'huge' is none of large, small"):
        programs(recipe, "targets", teacher="huge")
    with pytest.raises(InputError, match="posttraining: the recipe has none"):
        programs(dataclasses.replace(recipe, posttraining=None), "sft")


def test_teachers_that_are_not_here_have_the_shape_that_their_names_speak_of(monkeypatch):
    for size in ("8B", "70B"):
        monkeypatch.delenv(f"LLAMA_3_1_{size}", raising=False)
    recipe = load_recipe(ONE_B)
    assert known_teachers(recipe) == [presets.LLAMA_3_1_8B, presets.LLAMA_3_1_70B]
    shape, notes = student_shape(recipe)
    assert shape == presets.LLAMA_3_2_1B
    assert any("by its name" in note or "speaks of" in note for note in notes)
    assert presets.by_name("/models/Meta-Llama-3.1-8B-Instruct") is presets.LLAMA_3_1_8B
    assert presets.by_name("SmolLM2-135M.Q8_0.gguf") is presets.SMOLLM2_135M
    assert presets.by_name("Llama-2-7b") is None
    assert presets.by_name("runs/llama-3.2-1b/teacher") is None
    monkeypatch.setitem(
        recipe.teachers, "8b", type(recipe.teachers["8b"])(source="somewhere/unknown")
    )
    with pytest.raises(InputError, match=r"teachers\.8b: somewhere/unknown is not here"):
        programs(recipe, "prune")


def test_live_teachers_are_held_and_their_forward_passes_counted(recipe):
    """Of the stored teacher ids are read; of the live one all parameters, in the step's type."""
    overrides = [
        "size=test",
        "distill.terms.large.live=true",
        "distill.train.compute_dtype=bfloat16",
    ]
    live = load_recipe(TINY, overrides)
    choice = Choice(batch=1, mesh=parallel.MeshConfig(data=2, tensor=2))
    (program,) = programs(live, "distill", choice=choice)
    (without,) = programs(recipe, "distill", choice=choice)
    shape, length = recipe.teachers["large"].shape, recipe.corpus.sequence_length
    assert program.held["teachers"].keys() == {"large"}
    held = program.held["teachers"]["large"]
    assert described(held) == described(models.abstract_params(shape, "bfloat16"))
    assert held["layers"]["mlp"]["gate"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert program.held["batch"]["targets"].keys() == {"small"}
    assert without.held["batch"]["targets"].keys() == {"small", "large"}
    assert program.flops - without.flops == shape.flops_per_token(length) * 4 * length
    assert "module" in program.lower().as_text()[:20]
    assert planning.report.shard_bytes(program.held["teachers"]) > shape.parameters * 2 / 4


def test_targets_of_live_teachers_are_not_planned(recipe):
    live = load_recipe(TINY, ["size=test", "distill.terms.large.live=true"])
    (program,) = programs(live, "targets", choice=Choice(batch=1))
    assert program.name == "targets small"
    with pytest.raises(InputError, match="--teacher: 'large' is none of small"):
        programs(live, "targets", choice=Choice(batch=1), teacher="large")
    terms = {n: dataclasses.replace(one, live=True) for n, one in live.distill.terms.items()}
    alone = dataclasses.replace(live, distill=dataclasses.replace(live.distill, terms=terms))
    with pytest.raises(InputError, match="targets: of no teacher any are stored"):
        programs(alone, "targets", choice=Choice(batch=1))
