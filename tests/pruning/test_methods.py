"""Taylor, fluctuation and layer removal against float64 NumPy and brute force."""

import dataclasses

import jax
import numpy as np
import numpy_llama
import pytest
import tiny

from distill_jax import models
from distill_jax.artifacts import InputError
from distill_jax.pruning import ImportanceConfig, importance, removal_losses

SMALL = models.LlamaConfig(
    vocab_size=7,
    embed=4,
    mlp=3,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=2,
    tied=True,
    rope_theta=1e4,
)


def mean_loss(config, params, batch, masks=None):
    """Mean cross-entropy of the next tokens inside segments, by loops."""
    tokens, segments = batch["tokens"], batch["segment_ids"]
    logits = numpy_llama.logits(config, params, tokens, segments, masks, tied=config.tied)
    losses = []
    for b, t in np.ndindex(*tokens[:, :-1].shape):
        if segments[b, t] > 0 and segments[b, t] == segments[b, t + 1]:
            row = logits[b, t]
            losses.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[tokens[b, t + 1]])
    return np.mean(losses)


def products_by_differences(config, params, batch):
    """|w dL/dw| of every weight, by central differences."""
    params = jax.tree.map(lambda x: np.array(x, np.float64), params)

    def one(leaf):
        result = np.zeros_like(leaf)
        for index in np.ndindex(*leaf.shape):
            old, values = leaf[index], []
            for step in (1e-5, -1e-5):
                leaf[index] = old + step
                values.append(mean_loss(config, params, batch))
            leaf[index] = old
            result[index] = abs(old * (values[0] - values[1]) / 2e-5)
        return result

    return jax.tree.map(one, params)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_taylor_equals_finite_differences(tied):
    config = dataclasses.replace(SMALL, tied=tied)
    model, batch = tiny.model(config, scale=0.5), tiny.rows(3, time=5, vocab_size=7)
    got = importance(model, tiny.split(batch, 2), ImportanceConfig(method="taylor"))
    products = products_by_differences(config, model.params, batch)
    attention, mlp = products["layers"]["attention"], products["layers"]["mlp"]
    heads = attention["query"].sum((1, 3)) + attention["output"].sum((2, 3))
    kv_heads = (attention["key"] + attention["value"]).sum((1, 3))
    neurons = mlp["gate"].sum(1) + mlp["up"].sum(1) + mlp["down"].sum(2)
    embed = products["embedding"].sum(0) + products["final_norm"]
    if not tied:
        embed += products["unembedding"].sum(1)
    for name in ("query", "key", "value"):
        embed += attention[name].sum((0, 2, 3))
    embed += attention["output"].sum((0, 1, 2)) + mlp["down"].sum((0, 1))
    embed += mlp["gate"].sum((0, 2)) + mlp["up"].sum((0, 2))
    embed += attention["norm"].sum(0) + mlp["norm"].sum(0)
    layers = sum(x.reshape(2, -1).sum(1) for x in jax.tree.leaves(products["layers"]))
    want = {
        "heads": heads,
        "kv_heads": kv_heads + heads.reshape(2, 2, 2).sum(-1),
        "mlp": neurons,
        "embed": embed,
        "layers": layers,
    }
    for name, value in want.items():
        np.testing.assert_allclose(getattr(got, name), value, rtol=2e-3, atol=1e-6, err_msg=name)


def inputs(model, batch):
    """Each layer's inputs of weight matrices at all real tokens, [N, channels]."""
    runs = [
        (segments > 0, numpy_llama.row_activations(model.config, model.params, tokens, segments)[0])
        for tokens, segments in zip(batch["tokens"], batch["segment_ids"])
    ]
    return [
        {
            name: np.concatenate([seen[i][name].reshape(len(r), -1)[r] for r, seen in runs])
            for name in ("attention_input", "heads", "mlp_input", "neurons")
        }
        for i in range(model.config.layers)
    ]


@pytest.mark.slow
def test_fluctuation_is_variance_times_squared_norm():
    config = dataclasses.replace(tiny.SOURCE, layers=2)
    model, batch = tiny.model(config), tiny.rows(5)
    got = importance(
        model,
        [*tiny.split(batch, 2)[:2], *tiny.split(batch, 1)[4:]],
        ImportanceConfig(method="fluctuation"),
    )
    embed = np.zeros(12)
    for i, x in enumerate(inputs(model, batch)):
        attention, mlp = (
            {k: np.asarray(v, np.float64)[i] for k, v in model.params["layers"][block].items()}
            for block in ("attention", "mlp")
        )
        channels = x["heads"].var(0) * (attention["output"].reshape(64, 12) ** 2).sum(1)
        neurons = x["neurons"].var(0) * (mlp["down"] ** 2).sum(1)
        np.testing.assert_allclose(got.heads[i], channels.reshape(8, 8).sum(1), rtol=2e-4)
        np.testing.assert_allclose(got.kv_heads[i], channels.reshape(4, 16).sum(1), rtol=2e-4)
        np.testing.assert_allclose(got.mlp[i], neurons, rtol=2e-4)
        np.testing.assert_allclose(got.layers[i], channels.sum() + neurons.sum(), rtol=2e-4)
        read = sum((attention[name] ** 2).sum((1, 2)) for name in ("query", "key", "value"))
        embed += x["attention_input"].var(0) * read
        embed += x["mlp_input"].var(0) * ((mlp["gate"] ** 2).sum(1) + (mlp["up"] ** 2).sum(1))
    np.testing.assert_allclose(got.embed, embed, rtol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["taylor", "fluctuation"])
def test_methods_measure_the_powers_that_norms_need(method):
    model, batch = tiny.model(), tiny.rows(4)
    activation = importance(model, [batch])
    other = importance(model, tiny.split(batch, 2), ImportanceConfig(method=method))
    assert other.rows == activation.rows
    for name in ("attention_power", "mlp_power", "final_power"):
        np.testing.assert_allclose(
            getattr(other, name), getattr(activation, name), rtol=2e-5, err_msg=name
        )


@pytest.mark.slow
def test_removal_losses_equal_brute_force():
    model, batch = tiny.model(), tiny.rows(5)
    got = removal_losses(model, iter(tiny.split(batch, 2)))
    want = []
    for layer in range(model.config.layers):
        masks = numpy_llama.Masks.full(model.config)
        masks.layers[layer] = False
        want.append(mean_loss(model.config, model.params, batch, masks))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    with pytest.raises(InputError, match="no token to predict"):
        removal_losses(model, [])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["taylor", "fluctuation"])
def test_eight_devices_equal_one(method):
    config = dataclasses.replace(tiny.SOURCE, embed=16, vocab_size=32)
    model, batch = tiny.model(config), tiny.rows(8, vocab_size=32)
    one = importance(model, [batch], ImportanceConfig(method=method))
    mesh = jax.make_mesh((4, 2), ("rows", "mlp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    whole = jax.NamedSharding(mesh, jax.P())
    params = jax.device_put(model.params, whole)
    down = jax.NamedSharding(mesh, jax.P(None, "mlp", None))
    params["layers"]["mlp"]["down"] = jax.device_put(params["layers"]["mlp"]["down"], down)
    eight = importance(
        models.Model(config, params),
        [batch],
        ImportanceConfig(method=method),
        batch_sharding=jax.NamedSharding(mesh, jax.P("rows")),
    )
    for name in ("layers", "heads", "kv_heads", "mlp", "embed", "mlp_power"):
        np.testing.assert_allclose(
            getattr(eight, name), getattr(one, name), rtol=1e-4, err_msg=name
        )


@pytest.mark.parametrize("method", ["activation", "taylor", "fluctuation"])
@pytest.mark.parametrize(
    ("block", "name", "axis"), [("attention", "value", "heads"), ("mlp", "up", "mlp")]
)
def test_damaged_weights_are_named(method, block, name, axis):
    model = tiny.model()
    params = jax.tree.map(np.array, model.params)
    params["layers"][block][name][2, 3, 1] = np.nan
    with pytest.raises(InputError, match=f"layer 2 are NaN or infinite, first along .* '{axis}'"):
        importance(
            models.Model(model.config, params), [tiny.rows(2)], ImportanceConfig(method=method)
        )


@pytest.mark.slow
def test_rows_of_another_tokenizer_are_refused():
    batch = {"tokens": np.array([[1, 31]]), "segment_ids": np.array([[1, 1]])}
    with pytest.raises(InputError, match=r"token id 31, the model's vocabulary has 31"):
        importance(tiny.model(), [batch])
    # What stands in padding is nobody's token.
    padded = batch | {"segment_ids": np.array([[1, 0]])}
    importance(tiny.model(), [padded])
