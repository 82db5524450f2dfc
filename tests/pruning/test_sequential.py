import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpy_llama
import pytest
import tiny

from distill_jax import models
from distill_jax.artifacts import InputError
from distill_jax.pruning import apply_plan, make_plan, repair_in_sequence

RIDGE = 0.1
EVERYTHING = {"layers": 2, "embed": 9, "mlp": 12, "heads": 4, "kv_heads": 2, "head_dim": 4}


def run_layer(config, layer, streams, segments):
    """One layer of the NumPy model on given streams: its activations, real tokens of all rows."""
    one = dataclasses.replace(config, layers=1)
    stacked = {block: {k: x[None] for k, x in leaves.items()} for block, leaves in layer.items()}
    rows = []
    for x, row in zip(streams, segments, strict=True):
        # The stream is the embedding of tokens that are counted through.
        params = {"embedding": x, "layers": stacked, "final_norm": np.ones(x.shape[1])}
        seen, _ = numpy_llama.row_activations(one, params, np.arange(len(x)), row)
        rows.append(seen[0])
    return {name: [row[name] for row in rows] for name in rows[0]}


def least_squares(start, inputs, wanted, segments, weigh):
    """numpy.linalg.lstsq, with the ridge as further rows, around `start`."""
    real = np.concatenate(segments) > 0
    X = np.concatenate([x.reshape(len(x), -1) for x in inputs])[real]
    root = np.sqrt(1 / np.concatenate(weigh)[real])[:, None]
    X, Y = X * root, np.concatenate(wanted)[real] * root
    penalty = np.diag(np.sqrt(RIDGE * (X**2).sum(0)))
    lacks = np.concatenate((Y - X @ start, np.zeros((X.shape[1], Y.shape[1]))))
    return start + np.linalg.lstsq(np.concatenate((X, penalty)), lacks, rcond=None)[0]


def by_hand(plan, model, batch):
    """The repaired layers, in float64 NumPy, projection after projection."""
    config, small = plan.source, plan.target
    segments = batch["segment_ids"]
    full = jax.tree.map(numpy_llama.f64, model.params)
    student = jax.tree.map(numpy_llama.f64, apply_plan(plan, model.params))
    x = [full["embedding"][row] for row in batch["tokens"]]
    y = [student["embedding"][row] for row in batch["tokens"]]
    layers, ones = [], [np.ones(len(row)) for row in segments]

    def of(tree, i):
        return jax.tree.map(lambda leaf: leaf[i].copy(), tree["layers"])

    def forward(layer, streams):
        return run_layer(config, layer, streams, segments)

    def readers(mine, whole, block, names, kept, seen_full):
        name = f"{block}_input"
        seen = run_layer(small, mine, y, segments) if block == "attention" else None
        inputs = seen[name] if seen else [norm(row, mine["mlp"]["norm"]) for row in y]
        start = np.eye(config.embed)[plan.embed]
        guess = least_squares(start, inputs, seen_full[name], segments, ones)
        for reader in names:
            weight = np.einsum("ed,d...->e...", guess, whole[block][reader])
            mine[block][reader] = kept(reader, weight)

    def norm(row, weight):
        return row / np.sqrt((row**2).mean(-1, keepdims=True) + config.norm_eps) * weight

    for place, index in enumerate(plan.layers):
        end = [*plan.layers[1:], config.layers][place]
        whole, mine = of(full, index), of(student, place)
        for dropped in range(plan.layers[0] if place == 0 else 0):
            x = forward(of(full, dropped), x)["residual_out"]
        seen_full = forward(whole, x)
        flat = whole["attention"]["output"].reshape(-1, config.embed)
        middle = [a + h.reshape(len(h), -1) @ flat for a, h in zip(x, seen_full["heads"])]
        after = seen_full["residual_out"]
        for dropped in range(index + 1, end):
            after = forward(of(full, dropped), after)["residual_out"]

        def attention(reader, weight, place=place):
            chosen = plan.heads[place] if reader == "query" else plan.kv_heads[place]
            scale = (small.head_dim / config.head_dim) ** 0.5 if reader == "query" else 1
            return weight[:, chosen][:, :, plan.head_dim] * scale

        if small.embed < config.embed:
            names = ("query", "key", "value")
            readers(mine, whole, "attention", names, attention, seen_full)
        for block, leaf, name, target in (
            ("attention", "output", "heads", middle),
            ("mlp", "down", "neurons", after),
        ):
            if block == "mlp" and small.embed < config.embed:
                kept = plan.mlp[place]
                readers(
                    mine,
                    whole,
                    "mlp",
                    ("gate", "up"),
                    lambda _, w, kept=kept: w[:, kept],
                    seen_full,
                )
            if block == "attention":
                inputs = run_layer(small, mine, y, segments)[name]
            else:
                h = [norm(row, mine["mlp"]["norm"]) for row in y]
                gate = [row @ mine["mlp"]["gate"] for row in h]
                inputs = [
                    g / (1 + np.exp(-g)) * (row @ mine["mlp"]["up"]) for g, row in zip(gate, h)
                ]
            inputs = [row.reshape(len(row), -1) for row in inputs]
            wanted = [t[:, plan.embed] - row for t, row in zip(target, y, strict=True)]
            power = [(t**2).mean(-1) for t in target]
            start = mine[block][leaf].reshape(-1, small.embed)
            new = least_squares(start, inputs, wanted, segments, power)
            mine[block][leaf] = new.reshape(mine[block][leaf].shape)
            y = [row + i @ new for row, i in zip(y, inputs, strict=True)]
        layers.append(mine)
        x = after
    return layers


@pytest.mark.slow
@pytest.mark.parametrize("cut", [{"layers": 2}, EVERYTHING], ids=["layers", "everything"])
def test_every_projection_is_the_least_squares_solution(cut):
    model, batch = tiny.model(), tiny.rows(9)
    batch = {name: value[:-1] for name, value in batch.items()}
    target = dataclasses.replace(tiny.SOURCE, **cut)
    plan = make_plan(tiny.random_scores(tiny.SOURCE), tiny.SOURCE, target)
    got = repair_in_sequence(plan, model, tiny.split(batch, 3), ridge=RIDGE)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(
        lambda x: x.shape, models.abstract_params(target)
    )
    for place, want in enumerate(by_hand(plan, model, batch)):
        for block, names in (
            ("attention", ("query", "key", "value", "output")),
            ("mlp", ("gate", "up", "down")),
        ):
            for name in names:
                mine = np.asarray(got["layers"][block][name][place])
                if name not in ("output", "down"):
                    # A channel's weights may stand in its norm just as well.
                    before = apply_plan(plan, model.params)["layers"][block]["norm"][place]
                    growth = np.asarray(got["layers"][block]["norm"][place]) / np.asarray(before)
                    mine = mine * growth.reshape(-1, *[1] * (mine.ndim - 1))
                np.testing.assert_allclose(
                    mine, want[block][name], rtol=2e-3, atol=2e-4, err_msg=f"{place} {name}"
                )


@pytest.mark.slow
def test_nothing_cut_nothing_changed():
    model = tiny.model()
    plan = make_plan(tiny.random_scores(tiny.SOURCE), tiny.SOURCE, tiny.SOURCE)
    got = repair_in_sequence(plan, model, tiny.split(tiny.rows(8), 4))
    jax.tree.map(
        lambda mine, old: np.testing.assert_allclose(mine, old, atol=1e-5), got, model.params
    )


@pytest.mark.slow
def test_what_cannot_be_learnt_from_the_rows_is_left_as_it_was_cut():
    """Where every fit errs more than the plain cut on rows it did not see, the cut stays."""
    model, plan = tiny.model(), everything_plan()
    fitted = {
        "tokens": np.zeros((3, 12), np.int32),
        "segment_ids": np.eye(3, 12, dtype=np.int32) * [[1], [0], [0]],  # one token alone
    }
    checked = {"tokens": np.full((3, 12), 7, np.int32)}
    plain = apply_plan(plan, model.params)["layers"]
    chosen = repair_in_sequence(plan, model, [fitted, checked])["layers"]
    forced = repair_in_sequence(plan, model, [fitted, checked], ridge=1e-3)["layers"]
    unchanged = {
        (block, name, layer): np.array_equal(chosen[block][name][layer], plain[block][name][layer])
        for block, name in (("attention", "output"), ("mlp", "down"))
        for layer in range(2)
    }
    assert any(unchanged.values()), unchanged
    for block, name, layer in unchanged:
        assert not np.array_equal(forced[block][name][layer], plain[block][name][layer])


@pytest.mark.slow
def test_another_start_is_cut_but_is_not_the_aim():
    """Values doubled and outputs halved: the same function and aim, in other weights."""
    model, plan = tiny.model(), everything_plan()
    batches = tiny.split(tiny.rows(6), 3)
    doubled = dict(model.params["layers"]["attention"])
    doubled["value"], doubled["output"] = 2 * doubled["value"], doubled["output"] / 2
    start = model.params | {"layers": model.params["layers"] | {"attention": doubled}}
    want = repair_in_sequence(plan, model, batches, ridge=RIDGE)
    got = repair_in_sequence(plan, model, batches, start=start, ridge=RIDGE)
    tokens = tiny.rows(2)["tokens"][:1]
    np.testing.assert_allclose(
        models.logits(plan.target, got, tokens), models.logits(plan.target, want, tokens), atol=1e-3
    )
    values = (tree["layers"]["attention"]["value"] for tree in (got, want))
    assert not np.allclose(*values, rtol=0.3)


def test_wrong_inputs():
    other = dataclasses.replace(tiny.SOURCE, layers=tiny.SOURCE.layers + 1)
    with pytest.raises(InputError, match="not the model that the plan cuts"):
        repair_in_sequence(everything_plan(), tiny.model(other), [])
    with pytest.raises(InputError, match=r"ridge is -1\.0"):
        repair_in_sequence(everything_plan(), tiny.model(), [tiny.rows(3)], ridge=-1.0)
    with pytest.raises(InputError, match="no calibration batches"):
        repair_in_sequence(everything_plan(), tiny.model(), [])
    with pytest.raises(InputError, match="one calibration batch is too few"):
        repair_in_sequence(everything_plan(), tiny.model(), [tiny.rows(3)])


def everything_plan():
    target = dataclasses.replace(tiny.SOURCE, **EVERYTHING)
    return make_plan(tiny.random_scores(tiny.SOURCE), tiny.SOURCE, target)
