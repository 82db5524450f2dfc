import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpy_llama
import pytest
import tiny

from distill_jax import models, parallel
from distill_jax.artifacts import InputError
from distill_jax.pruning import (
    ImportanceConfig,
    Scores,
    activations,
    importance,
    make_plan,
    model_fingerprint,
)

ARRAYS = [
    field.name
    for field in dataclasses.fields(Scores)
    if field.name not in ("method", "model", "rows", "removal", "removal_rows", "tokenizer")
]
NUMPY = {
    "mean": lambda x: np.abs(x).mean(0),
    "l2": lambda x: np.sqrt((x**2).sum(0)),
    "variance": lambda x: x.var(0),
}


def brute_force(model, batch, sequence, over_rows):
    """Minitron's scores by loops over layers and rows, from the NumPy model's activations."""
    config = model.config
    runs = [
        (real, *numpy_llama.row_activations(config, model.params, tokens, segments))
        for tokens, segments in zip(batch["tokens"], batch["segment_ids"])
        if (real := segments > 0).any()
    ]

    def score(value):
        per_row = [
            [NUMPY[sequence](value(layer)[real]) for layer in seen] for real, seen, _ in runs
        ]
        return NUMPY[over_rows](np.array(per_row))

    def grouped(layer):
        heads = layer["heads"]
        return np.linalg.norm(heads.reshape(len(heads), config.kv_heads, -1), axis=-1)

    def cosine(layer):
        a, b = layer["residual_in"], layer["residual_out"]
        return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)

    def tokens(value):
        return [np.concatenate([value(s[i])[r] for r, s, _ in runs]) for i in range(config.layers)]

    embed = score(lambda layer: layer["attention_input"]) + score(lambda layer: layer["mlp_input"])
    stream = tokens(lambda layer: layer["residual_in"])
    eps = config.norm_eps
    power = [(x**2 / ((x**2).mean(-1, keepdims=True) + eps)).mean(0) for x in stream]
    return {
        "layers": 1 - np.array([x.mean() for x in tokens(cosine)]),
        "heads": score(lambda layer: np.linalg.norm(layer["heads"], axis=-1)),
        "kv_heads": score(grouped),
        "mlp": score(lambda layer: layer["neurons"]),
        "embed": embed.sum(0),
        "attention_power": np.array([x / x.mean() for x in power]),
    }


@pytest.mark.slow
@pytest.mark.parametrize("sequence", NUMPY)
@pytest.mark.parametrize("over_rows", NUMPY)
def test_scores_equal_brute_force(sequence, over_rows):
    config = dataclasses.replace(tiny.SOURCE, layers=2)
    model, batch = tiny.model(config), tiny.rows(5)
    got = importance(
        model,
        tiny.split(batch, 2)[:2] + tiny.split(batch, 1)[4:],
        ImportanceConfig(sequence_aggregation=sequence, batch_aggregation=over_rows),
    )
    for name, want in brute_force(model, batch, sequence, over_rows).items():
        np.testing.assert_allclose(getattr(got, name), want, rtol=2e-4, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_scores_do_not_depend_on_the_split_into_batches():
    model, batch = tiny.model(), tiny.rows(16)
    for how in NUMPY:
        config = ImportanceConfig(batch_aggregation=how)
        one = importance(model, [batch], config)
        four = importance(model, tiny.split(batch, 4), config)
        assert one.rows == four.rows
        for name in ARRAYS:
            np.testing.assert_allclose(
                getattr(one, name), getattr(four, name), rtol=2e-5, atol=1e-6
            )


@pytest.mark.slow
def test_padding_counts_nowhere():
    model, batch = tiny.model(), tiny.rows(4)
    changed = np.where(batch["segment_ids"] > 0, batch["tokens"], 7)
    assert (changed != batch["tokens"]).any()
    one, other = (importance(model, [batch | {"tokens": x}]) for x in (batch["tokens"], changed))
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_a_variance_far_below_the_mean_survives():
    """Sums of squares would lose it: 1000 +- 0.01 in float32."""
    from distill_jax.pruning.activations import Moments

    values = (1000 + 0.01 * np.random.default_rng(0).normal(size=(64, 3))).astype(np.float32)
    moments = Moments.zeros((3,))
    for rows in np.split(values, 16):
        moments = moments.merge(Moments.of(jnp.asarray(rows), jnp.ones(len(rows))))
    np.testing.assert_allclose(
        moments.aggregate("variance"), values.astype(np.float64).var(0), rtol=0.05
    )


def test_scores_point_at_what_matters():
    """A silenced head, neuron, channel and layer rank last, and a plan drops just them."""
    model = tiny.model()
    params = jax.tree.map(np.array, model.params)
    attention, mlp = params["layers"]["attention"], params["layers"]["mlp"]
    attention["value"][:, :, 2] = 0
    mlp["up"][:, :, 5] = 0
    attention["norm"][:, 3] = mlp["norm"][:, 3] = 0
    attention["output"][1] = mlp["down"][1] = 0
    scores = importance(models.Model(model.config, params), [tiny.rows(4)])
    target = dataclasses.replace(
        tiny.SOURCE, layers=3, embed=11, mlp=19, kv_heads=3, heads=6, tied=True
    )
    plan = make_plan(scores, tiny.SOURCE, target)
    np.testing.assert_array_equal(plan.layers, [0, 2, 3])
    assert 3 not in plan.embed
    assert 2 not in plan.kv_heads
    assert 5 not in plan.mlp
    np.testing.assert_array_equal(plan.heads[0], [0, 1, 2, 3, 6, 7])


def test_magnitude_is_the_norm_of_the_weights():
    model = tiny.model()
    scores = importance(model, [], ImportanceConfig(method="magnitude"))
    mlp = {name: np.asarray(x, np.float64) for name, x in model.params["layers"]["mlp"].items()}
    squares = (mlp["gate"] ** 2).sum(1) + (mlp["up"] ** 2).sum(1) + (mlp["down"] ** 2).sum(2)
    np.testing.assert_allclose(scores.mlp, np.sqrt(squares), rtol=1e-5)
    attention = {
        k: np.asarray(x, np.float64) for k, x in model.params["layers"]["attention"].items()
    }
    squares = (attention["query"] ** 2).sum((1, 3)) + (attention["output"] ** 2).sum((2, 3))
    np.testing.assert_allclose(scores.heads, np.sqrt(squares), rtol=1e-5)
    squares = squares.reshape(4, 4, 2).sum(-1)
    squares += (attention["key"] ** 2).sum((1, 3)) + (attention["value"] ** 2).sum((1, 3))
    np.testing.assert_allclose(scores.kv_heads, np.sqrt(squares), rtol=1e-5)
    embed = sum(
        (np.asarray(leaf, np.float64) ** 2).sum(
            tuple(i for i, n in enumerate(names) if n != "embed")
        )
        for leaf, names in zip(
            jax.tree.leaves(model.params),
            jax.tree.leaves(models.logical_axes(model.config), is_leaf=lambda x: type(x) is tuple),
            strict=True,
        )
    )
    np.testing.assert_allclose(scores.embed, np.sqrt(embed), rtol=1e-5)


def test_random_is_seeded():
    model = tiny.model()
    draws = [
        importance(model, [], ImportanceConfig(method="random", seed=seed)).mlp
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()


def test_scores_file(tmp_path):
    scores = importance(tiny.model(), [tiny.rows(2)])
    removal = np.arange(4, dtype=np.float32)
    scores = dataclasses.replace(scores, removal=removal, removal_rows="r", tokenizer="t")
    scores.save(tmp_path / "scores.safetensors")
    loaded = Scores.load(tmp_path / "scores.safetensors")
    for field in dataclasses.fields(Scores):
        np.testing.assert_array_equal(getattr(loaded, field.name), getattr(scores, field.name))
    scores.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (
        tmp_path / "scores.safetensors"
    ).read_bytes()
    (tmp_path / "broken.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"broken\.safetensors: not a scores file"):
        Scores.load(tmp_path / "broken.safetensors")


@pytest.mark.slow
def test_rows_of_eight_devices_score_as_those_of_one():
    config = dataclasses.replace(tiny.SOURCE, embed=16, vocab_size=32)
    model, batch = tiny.model(config), tiny.rows(7, vocab_size=32)
    one = importance(model, [batch])
    mesh = parallel.make_mesh(parallel.MeshConfig(fsdp=4, tensor=2))
    places = parallel.shardings(mesh, models.logical_axes(config), model.params)
    spread = models.Model(config, jax.device_put(model.params, places))
    for split in (parallel.batch_sharding(mesh), jax.NamedSharding(mesh, jax.P())):
        eight = importance(spread, [batch], batch_sharding=split)
        assert eight.rows == one.rows
        for name in ARRAYS:
            np.testing.assert_allclose(
                getattr(eight, name), getattr(one, name), rtol=1e-4, atol=1e-6, err_msg=name
            )


def test_a_device_makes_layers_whole_and_reads_rows_of_its_own():
    config = dataclasses.replace(tiny.SOURCE, embed=16, vocab_size=32)
    mesh = parallel.make_mesh(parallel.MeshConfig(fsdp=8))
    tokens = np.zeros((8, 4), np.int32)
    traced = activations.accumulate.trace(
        activations.zeros(config),
        tiny.model(config).params,
        tokens,
        tokens + 1,
        config=config,
        how="mean",
        batch_sharding=parallel.batch_sharding(mesh),
    )
    assert "all_gather" in str(traced.jaxpr)


def test_fingerprint_sees_every_weight_but_not_the_devices():
    model = tiny.model(dataclasses.replace(tiny.SOURCE, embed=16))
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(model.params["embedding"], jax.NamedSharding(mesh, jax.P(None, "x")))
    want = model_fingerprint(model)
    assert (
        model_fingerprint(models.Model(model.config, model.params | {"embedding": spread})) == want
    )
    embedding = model.params["embedding"]
    swapped = embedding.at[0].set(embedding[1]).at[1].set(embedding[0])
    nudged = embedding.at[3, 4].add(1e-6)
    for changed in (swapped, nudged):
        other = models.Model(model.config, model.params | {"embedding": changed})
        assert model_fingerprint(other) != want


def test_wrong_inputs():
    with pytest.raises(InputError, match="method is 'wanda'; choose one of activation"):
        ImportanceConfig(method="wanda")
    with pytest.raises(InputError, match="hold no tokens"):
        importance(tiny.model(), [])
