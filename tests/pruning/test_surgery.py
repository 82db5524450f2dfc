import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import numpy_llama
import optax
import pytest
import tiny

from distill_jax import models, parallel
from distill_jax.artifacts import InputError
from distill_jax.parallel import tpu_cost
from distill_jax.pruning import apply_plan, make_plan, take, take_state
from distill_jax.recipe import load_recipe

SCALING_8 = models.RopeScaling(factor=8.0)
SCALING_32 = models.RopeScaling(factor=32.0)
LLAMA_3_1_8B = models.LlamaConfig(
    vocab_size=128256,
    embed=4096,
    mlp=14336,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    tied=False,
    rope_scaling=SCALING_8,
)
LLAMA_3_2_3B = dataclasses.replace(
    LLAMA_3_1_8B, embed=3072, mlp=8192, layers=28, heads=24, tied=True, rope_scaling=SCALING_32
)
LLAMA_3_2_1B = dataclasses.replace(
    LLAMA_3_2_3B, embed=2048, layers=16, heads=32, kv_heads=8, head_dim=64
)

CUTS = {
    "nothing": {},
    "layers": {"layers": 2},
    "embed": {"embed": 7},
    "mlp": {"mlp": 9},
    "kv_heads": {"kv_heads": 2, "heads": 4},
    "query_heads_of_each_group": {"heads": 4},
    "kv_heads_and_smaller_groups": {"kv_heads": 2, "heads": 2},
    "half_of_head_dim": {"head_dim": 4},
    "quarter_of_head_dim": {"head_dim": 2},
    "tied": {"tied": True},
    "rope_scaling": {"rope_scaling": models.RopeScaling(factor=32.0, original_context=64)},
    "everything": tiny.EVERYTHING,
}


def difference(plan, model, pruned=None):
    """Largest difference between the pruned model's logits and the masked model's."""
    batch = tiny.rows(3, vocab_size=plan.source.vocab_size, seed=3)
    tokens, segments = batch["tokens"], batch["segment_ids"]
    pruned = pruned or jax.jit(lambda params: apply_plan(plan, params))(model.params)
    got = jax.jit(models.logits, static_argnums=0)(plan.target, pruned, tokens, segments)
    masked = dataclasses.replace(plan.source, rope_scaling=plan.target.rope_scaling)
    want = numpy_llama.logits(
        masked,
        model.params,
        tokens,
        segments,
        numpy_llama.Masks.of_plan(plan),
        tied=plan.target.tied,
    )
    real = segments > 0
    assert np.abs(want[real]).max() > 1
    return np.abs(np.asarray(got) - want)[real].max()


@pytest.mark.parametrize("name", CUTS)
def test_pruned_equals_masked(name):
    target = dataclasses.replace(tiny.SOURCE, **CUTS[name])
    plan = make_plan(tiny.random_scores(tiny.SOURCE), tiny.SOURCE, target)
    assert difference(plan, tiny.model()) < 1e-5


def test_interleaved_pairs_would_be_caught():
    """(0, 1), (4, 5) are whole pairs in the other layout; cutting them so breaks the function."""
    target = dataclasses.replace(tiny.SOURCE, head_dim=4)
    plan = make_plan(tiny.random_scores(tiny.SOURCE), tiny.SOURCE, target)
    wrong = dataclasses.replace(plan, head_dim=np.array([0, 1, 4, 5], np.int32))
    assert difference(wrong, tiny.model()) > 1e-2


def test_forgotten_score_scale_would_be_caught():
    target = dataclasses.replace(tiny.SOURCE, head_dim=4)
    plan = make_plan(tiny.random_scores(tiny.SOURCE), tiny.SOURCE, target)
    model = tiny.model()
    pruned = apply_plan(plan, model.params)
    pruned["layers"]["attention"]["query"] *= 2**0.5
    assert difference(plan, model, pruned) > 1e-2


@pytest.mark.parametrize("seed", range(2))
def test_pruned_equals_masked_on_random_shapes(seed):
    random = np.random.default_rng(seed)
    kv_heads, group, divisor = (int(x) for x in random.integers(1, 4, 3))
    source = models.LlamaConfig(
        vocab_size=int(random.integers(20, 40)),
        embed=int(random.integers(8, 20)),
        mlp=int(random.integers(8, 30)),
        layers=int(random.integers(1, 5)),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=4 * divisor,
        tied=bool(random.integers(2)),
        rope_theta=float(random.uniform(1e2, 1e5)),
    )
    kept_kv_heads = int(random.integers(1, kv_heads + 1))
    target = dataclasses.replace(
        source,
        embed=int(random.integers(4, source.embed + 1)),
        mlp=int(random.integers(4, source.mlp + 1)),
        layers=int(random.integers(1, source.layers + 1)),
        kv_heads=kept_kv_heads,
        heads=kept_kv_heads * int(random.integers(1, group + 1)),
        head_dim=4,
        tied=True,
    )
    plan = make_plan(tiny.random_scores(source, seed), source, target)
    assert difference(plan, tiny.model(source, seed)) < 1e-5


def test_masks_with_no_cut_are_the_model():
    """The oracle agrees with the package's forward pass before anything is pruned."""
    model, batch = tiny.model(), tiny.rows(3)
    tokens, segments = batch["tokens"], batch["segment_ids"]
    got = models.logits(model.config, model.params, tokens, segments)
    want = numpy_llama.logits(model.config, model.params, tokens, segments, tied=False)
    np.testing.assert_allclose(got[segments > 0], want[segments > 0], atol=1e-5)


# By hand, V D + L (2 D C (H + K) + 3 D F + 2 D) + D:
# 1B: 128256*2048 + 16 (2*2048*64*40 + 3*2048*8192 + 4096) + 2048, 3B: 128256*3072
# + 28 (2*3072*128*32 + 3*3072*8192 + 6144) + 3072.
@pytest.mark.parametrize(
    ("config", "target", "parameters"),
    [
        ("llama3_2_1b.py", LLAMA_3_2_1B, 1_235_814_400),
        ("llama3_2_3b.py", LLAMA_3_2_3B, 3_212_749_824),
    ],
)
def test_shapes_of_llama_3_2(config, target, parameters):
    recipe = load_recipe(pathlib.Path(__file__).parents[2] / "configs" / config)
    assert recipe.prune.target == target
    plan = make_plan(tiny.random_scores(LLAMA_3_1_8B), LLAMA_3_1_8B, target)
    abstract = models.abstract_params(LLAMA_3_1_8B, jnp.bfloat16)
    pruned = jax.eval_shape(lambda params: apply_plan(plan, params), abstract)
    assert sum(leaf.size for leaf in jax.tree.leaves(pruned)) == parameters
    wanted = models.abstract_params(target, jnp.bfloat16)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), pruned) == jax.tree.map(
        lambda x: (x.shape, x.dtype), wanted
    )


def test_eight_devices_equal_one():
    source = dataclasses.replace(tiny.SOURCE, embed=16, vocab_size=32)
    target = dataclasses.replace(
        source, embed=8, mlp=10, layers=3, heads=4, kv_heads=2, head_dim=4, tied=True
    )
    plan = make_plan(tiny.random_scores(source), source, target)
    params = tiny.model(source).params
    one = apply_plan(plan, params)

    mesh = parallel.make_mesh(parallel.MeshConfig(fsdp=4, tensor=2))
    before = parallel.shardings(mesh, models.logical_axes(source), params)
    after = parallel.shardings(mesh, models.logical_axes(target), one)
    eight = jax.jit(lambda x: apply_plan(plan, x, mesh=mesh), out_shardings=after)(
        jax.device_put(params, before)
    )
    assert len(eight["layers"]["mlp"]["down"].sharding.device_set) == 8
    assert eight["layers"]["mlp"]["down"].addressable_shards[0].data.shape == (3, 5, 2)
    jax.tree.map(np.testing.assert_array_equal, eight, one)


def test_take_serves_any_tree_that_bears_the_axes():
    """Taking commutes with whatever is done element by element, as an optimizer's moments are."""
    target = dataclasses.replace(tiny.SOURCE, **CUTS["everything"] | {"tied": False})
    plan = make_plan(tiny.random_scores(tiny.SOURCE), tiny.SOURCE, target)
    axes, params = models.logical_axes(tiny.SOURCE), tiny.model().params
    moments = {"mu": params, "nu": jax.tree.map(jnp.square, params)}
    cut = take(plan, moments, {"mu": axes, "nu": axes})
    jax.tree.map(np.testing.assert_array_equal, cut["nu"], jax.tree.map(jnp.square, cut["mu"]))
    query = np.asarray(params["layers"]["attention"]["query"])
    layer = 1
    expected = query[plan.layers[layer]][np.ix_(plan.embed, plan.heads[layer], plan.head_dim)]
    np.testing.assert_array_equal(cut["mu"]["layers"]["attention"]["query"][layer], expected)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_optimizer_state_is_cut_like_the_parameters(tied):
    """Adam's moments after real gradients, inside a chain, against slices by hand."""
    target = dataclasses.replace(tiny.SOURCE, **CUTS["everything"] | {"tied": tied})
    plan = make_plan(tiny.random_scores(tiny.SOURCE), tiny.SOURCE, target)
    params = tiny.model().params
    optimizer = optax.MultiSteps(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), every_k_schedule=2
    )
    state = optimizer.init(params)
    for step in range(3):
        _, state = optimizer.update(tiny.model(seed=step).params, state, params)
    cut = jax.jit(lambda state: take_state(plan, state))(state)
    fresh = optimizer.init(apply_plan(plan, params))
    assert jax.tree.structure(cut) == jax.tree.structure(fresh)
    assert jax.tree.map(jnp.shape, cut) == jax.tree.map(jnp.shape, fresh)
    assert (cut.mini_step, cut.gradient_step) == (1, 1)
    adam, old = (s.inner_opt_state[1][0] for s in (cut, state))
    assert adam.count == 1
    for moment in ("mu", "nu"):
        new, whole = (jax.tree.map(np.asarray, getattr(x, moment)) for x in (adam, old))
        assert np.abs(whole["embedding"]).max() > 0
        np.testing.assert_array_equal(new["embedding"], whole["embedding"][:, plan.embed])
        for place, layer in enumerate(plan.layers):
            kept = {
                ("attention", "norm"): np.ix_(plan.embed),
                ("attention", "key"): np.ix_(plan.embed, plan.kv_heads[place], plan.head_dim),
                ("attention", "output"): np.ix_(plan.heads[place], plan.head_dim, plan.embed),
                ("mlp", "down"): np.ix_(plan.mlp[place], plan.embed),
            }
            for (block, name), index in kept.items():
                np.testing.assert_array_equal(
                    new["layers"][block][name][place], whole["layers"][block][name][layer][index]
                )


def test_a_state_that_does_not_mirror_the_parameters_is_refused():
    target = dataclasses.replace(tiny.SOURCE, **CUTS["everything"])
    plan = make_plan(tiny.random_scores(tiny.SOURCE), tiny.SOURCE, target)
    state = optax.adafactor(1e-3, min_dim_size_to_factor=4).init(tiny.model().params)
    with pytest.raises(InputError, match=r"optimizer state.*v_row.* does not mirror"):
        take_state(plan, state)


def test_no_device_ever_holds_a_whole_parameter():
    """The compiled program moves split arrays; whole it makes norms and indices alone."""
    source = dataclasses.replace(
        tiny.SOURCE, vocab_size=512, embed=64, mlp=224, layers=8, kv_heads=8, heads=16, head_dim=16
    )
    target = dataclasses.replace(source, embed=32, mlp=128, layers=4, head_dim=8, tied=True)
    plan = make_plan(tiny.random_scores(source), source, target)
    mesh = parallel.make_mesh(parallel.MeshConfig(fsdp=4, tensor=2))

    def placed(config):
        shapes = models.abstract_params(config)
        return parallel.shardings(mesh, models.logical_axes(config), shapes)

    def largest_gathered(mesh):
        cut = jax.jit(
            lambda params: apply_plan(plan, params, mesh=mesh),
            in_shardings=(placed(source),),
            out_shardings=placed(target),
        )
        compiled = cut.lower(models.abstract_params(source)).compile()
        return tpu_cost.largest_gathered(compiled.as_text())

    smallest, largest = (4 * 64 * 8 * 16, 4 * 64 * 224)  # matrices of a layer: keys, neurons
    assert largest_gathered(None) > largest
    assert 0 < largest_gathered(mesh) < smallest / 10
