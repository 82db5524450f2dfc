import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_llama
import optax
import pytest
import tiny

from distill_jax import losses, models, parallel
from distill_jax.artifacts import InputError
from distill_jax.parallel import tpu_cost
from distill_jax.pruning import (
    apply_plan,
    grams,
    importance,
    make_plan,
    repair,
    repair_in_sequence,
)
from distill_jax.pruning.prune import jit_repair
from distill_jax.pruning.repair import batch_grams
from distill_jax.pruning.tying import batch_sums

RIDGE = 1e-2


def flattened(batch, model, name):
    """Real tokens' activations [N, inputs] of each layer, from the NumPy model."""
    rows = [
        (segments > 0, numpy_llama.row_activations(model.config, model.params, tokens, segments)[0])
        for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True)
    ]
    return [
        np.concatenate([seen[layer][name].reshape(len(real), -1)[real] for real, seen in rows])
        for layer in range(model.config.layers)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "block", "leaf"),
    [
        ("attention_input", "attention", "query"),
        ("heads", "attention", "output"),
        ("mlp_input", "mlp", "up"),
        ("neurons", "mlp", "down"),
    ],
)
def test_repair_solves_the_least_squares_problem(name, block, leaf):
    """Against numpy.linalg.lstsq with the ridge written as extra rows."""
    model, batch = tiny.model(), tiny.rows(8)
    target = dataclasses.replace(
        tiny.SOURCE, layers=3, embed=9, mlp=12, heads=4, kv_heads=2, head_dim=4
    )
    plan = make_plan(tiny.random_scores(tiny.SOURCE), tiny.SOURCE, target)
    sums = grams(model, plan, tiny.split(batch, 4))
    repaired = repair(plan, model.params, sums, ridge=RIDGE)
    flat_heads = (plan.heads[..., None] * 8 + plan.head_dim).reshape(3, -1)
    kept = {"heads": flat_heads, "neurons": plan.mlp}.get(name, [plan.embed] * 3)
    inputs = flattened(batch, model, name)
    for layer, rows in zip(plan.layers, kept, strict=True):
        X = inputs[layer]
        old = np.asarray(model.params["layers"][block][leaf][layer], np.float64)
        old = old.reshape(X.shape[1], -1)
        new = np.array(repaired["layers"][block][leaf][layer]).reshape(old.shape)
        if name.endswith("_input"):
            # A channel's weights may grow in its norm just as well.
            norms = (tree["layers"][block]["norm"][layer] for tree in (repaired, model.params))
            new *= np.divide(*map(np.asarray, norms))[:, None]
        penalty = np.diag(np.sqrt((RIDGE + len(rows) / len(X)) * (X[:, rows] ** 2).sum(0)))
        # The ridge pulls towards the plain cut: solve for the difference.
        lost = X @ old - X[:, rows] @ old[rows]
        design = np.concatenate((X[:, rows], penalty))
        wanted = np.concatenate((lost, np.zeros((len(rows), lost.shape[1]))))
        change = np.linalg.lstsq(design, wanted, rcond=None)[0]
        np.testing.assert_allclose(new[rows], old[rows] + change, rtol=1e-3, atol=1e-4)
        untouched = np.setdiff1d(np.arange(len(old)), rows)
        np.testing.assert_array_equal(new[untouched], old[untouched])


@pytest.mark.slow
def test_a_quiet_channel_s_weights_grow_in_the_norm():
    """Norms silence a kept channel that must speak for others: no weight behind it may explode."""
    model, batch = tiny.model(), tiny.rows(8)
    params = jax.tree.map(np.array, model.params)
    target = dataclasses.replace(tiny.SOURCE, embed=9)
    plan = make_plan(tiny.random_scores(tiny.SOURCE), tiny.SOURCE, target)
    blocks = {"attention": ("query", "key", "value"), "mlp": ("gate", "up")}
    for block in blocks:
        params["layers"][block]["norm"][:, plan.embed[0]] = 1e-4
    params["final_norm"][plan.embed[0]] = 1e-4
    model = models.Model(model.config, params)
    after = repair(plan, params, grams(model, plan, [batch]))
    assert after["final_norm"][plan.embed[0]] > 1e-3
    np.testing.assert_allclose(
        *(np.linalg.norm(tree["unembedding"], axis=1) for tree in (params, after)), rtol=1e-5
    )
    repaired = after["layers"]
    for block, readers in blocks.items():
        grown = np.asarray(repaired[block]["norm"]) / params["layers"][block]["norm"]
        assert grown[:, plan.embed[0]].min() > 10
        sizes = [
            sum(np.square(tree[block][r].reshape(4, 12, -1)).sum(-1) for r in readers)
            for tree in (params["layers"], repaired)
        ]
        np.testing.assert_allclose(*sizes, rtol=1e-5)


@pytest.mark.slow
def test_redundant_neurons_are_recovered():
    """Every second neuron is a copy of its neighbour: half of them can do all the work."""
    model = tiny.model()
    params = jax.tree.map(np.array, model.params)
    for name in ("gate", "up"):
        params["layers"]["mlp"][name][:, :, 1::2] = params["layers"]["mlp"][name][:, :, ::2]
    model = models.Model(model.config, params)
    target = dataclasses.replace(tiny.SOURCE, mlp=10)
    plan = make_plan(tiny.random_scores(tiny.SOURCE), tiny.SOURCE, target)
    plan = dataclasses.replace(plan, mlp=np.tile(np.arange(0, 20, 2, dtype=np.int32), (4, 1)))
    batch = tiny.rows(256)
    sums = grams(model, plan, [batch])
    fixed = repair(plan, model.params, sums, ridge=1e-6)
    tokens, segments = batch["tokens"][:2], batch["segment_ids"][:2]
    want = models.logits(model.config, model.params, tokens, segments)
    error = {
        name: jnp.abs(models.logits(target, apply_plan(plan, p), tokens, segments) - want)
        for name, p in {"cut": model.params, "repaired": fixed}.items()
    }
    error = {name: x[segments > 0].max() for name, x in error.items()}
    assert error["cut"] > 0.1
    assert error["repaired"] < error["cut"] / 10


def test_nothing_cut_nothing_changed():
    model = tiny.model()
    plan = make_plan(tiny.random_scores(tiny.SOURCE), tiny.SOURCE, tiny.SOURCE)
    assert grams(model, plan, []) == {}
    jax.tree.map(np.testing.assert_array_equal, repair(plan, model.params, {}), model.params)


def test_no_batches():
    target = dataclasses.replace(tiny.SOURCE, mlp=10)
    plan = make_plan(tiny.random_scores(tiny.SOURCE), tiny.SOURCE, target)
    with pytest.raises(InputError, match="no calibration batches"):
        grams(tiny.model(), plan, [])


@pytest.mark.slow
def test_eight_devices_equal_one():
    model, batch = tiny.model(dataclasses.replace(tiny.SOURCE, embed=16)), tiny.rows(8)
    target = dataclasses.replace(model.config, embed=8, mlp=12)
    plan = make_plan(tiny.random_scores(model.config), model.config, target)
    mesh = parallel.make_mesh(parallel.MeshConfig(fsdp=4, tensor=2))
    one = grams(model, plan, [batch])
    eight = grams(model, plan, [batch], mesh=mesh)
    assert eight["neurons"].addressable_shards[0].data.shape == (4, 5, 10)
    for name in one:
        np.testing.assert_allclose(eight[name], one[name], rtol=1e-4, atol=1e-4)
    placed = parallel.shardings(mesh, models.logical_axes(model.config), model.params)
    params = jax.device_put(model.params, placed)
    got = jit_repair(plan, RIDGE, mesh)(params, eight)
    want = jit_repair(plan, RIDGE, None)(model.params, one)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), got, want)


@pytest.mark.parametrize("statistics", ["grams", "tying"])
def test_statistics_gather_weights_and_no_tokens(statistics):
    """Of all that is sent no array is larger than a layer, though there are many more tokens."""
    config = dataclasses.replace(tiny.SOURCE, embed=16, mlp=32)
    mesh = parallel.make_mesh(parallel.MeshConfig(fsdp=8))
    abstract = models.abstract_params(config)
    params = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        abstract,
        parallel.shardings(mesh, models.logical_axes(config), abstract),
    )
    tokens = jax.ShapeDtypeStruct((64, 64), jnp.int32, sharding=parallel.batch_sharding(mesh))
    if statistics == "grams":
        names = ("attention_input", "heads", "mlp_input", "neurons", "final")
        lowered = batch_grams.lower(params, tokens, tokens, config, names, mesh)
    else:
        lowered = batch_sums.lower(config, params, tokens, tokens, mesh)
    layer = (config.non_embedding_parameters - config.embed) // config.layers * 4
    assert tpu_cost.largest_gathered(lowered.compile().as_text()) <= layer


@pytest.fixture(scope="module")
def trained():
    """A small Llama that has learnt a language of noisy second-order rules, and its rows."""
    config = dataclasses.replace(
        tiny.SOURCE, vocab_size=16, embed=32, mlp=64, layers=2, rope_scaling=None
    )
    random = np.random.default_rng(0)
    rule = random.permutation(256).reshape(16, 16) % 16
    tokens = random.integers(0, 16, (320, 32), dtype=np.int32)
    for t in range(2, 32):
        follows = random.random(len(tokens)) < 0.9
        tokens[:, t] = np.where(follows, rule[tokens[:, t - 2], tokens[:, t - 1]], tokens[:, t])
    optimizer = optax.adam(3e-3)

    # It runs long enough to be worth optimising.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})
    def step(carry, rows):
        params, state = carry
        gradient = jax.grad(lambda p: mean_loss(config, p, rows))(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    params = tiny.model(config, scale=0.1).params
    carry = params, optimizer.init(params)
    for i in range(200):
        carry = step(carry, tokens[32 * (i % 8) :][:32])
    return models.Model(config, carry[0]), tokens[:64], tokens[256:]


@functools.partial(jax.jit, static_argnums=0)
def mean_loss(config, params, tokens):
    logits = models.logits(config, params, tokens)[:, :-1]
    return losses.cross_entropy(logits, jnp.asarray(tokens)[:, 1:]).mean()


@pytest.mark.slow
@pytest.mark.parametrize(
    "cut",
    [
        {"mlp": 32},
        {"embed": 24},
        {"heads": 4, "head_dim": 4},
        {"mlp": 40, "embed": 28, "heads": 4},
        {"layers": 1},
    ],
    ids=str,
)
def test_repair_lowers_the_held_out_loss_of_a_trained_model(trained, cut):
    model, calibration, held_out = trained
    batches = [{"tokens": rows} for rows in calibration.reshape(4, 16, -1)]
    target = dataclasses.replace(model.config, **cut)
    plan = make_plan(importance(model, batches), model.config, target)
    sums = grams(model, plan, batches)
    full = mean_loss(model.config, model.params, held_out)
    plain, at_once = (
        mean_loss(target, jax.jit(make)(model.params, sums), held_out)
        for make in (
            lambda params, _: apply_plan(plan, params),
            lambda params, sums: apply_plan(plan, repair(plan, params, sums)),
        )
    )
    in_sequence = mean_loss(target, repair_in_sequence(plan, model, batches), held_out)
    assert plain > full + 0.01
    if "layers" in cut:  # one pass has nothing to say about layers
        assert at_once == plain
    else:
        assert at_once < plain
    assert in_sequence < min(plain, at_once)
