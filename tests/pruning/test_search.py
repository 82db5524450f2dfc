import dataclasses

import jax
import numpy as np
import pytest
import tiny
from test_methods import mean_loss

from distill_jax import models
from distill_jax.artifacts import InputError
from distill_jax.pruning import (
    Candidate,
    SearchConfig,
    apply_plan,
    candidate_shapes,
    cost_of,
    grams,
    make_plan,
    pareto,
    repair,
    search,
)
from distill_jax.pruning.calibration import batch_loss

SOURCE = dataclasses.replace(tiny.SOURCE, embed=16, mlp=24, tied=True)
ROWS = tiny.split(tiny.rows(4), 2)


def by_hand(budget, tolerance):
    """(layers, embed, kv_heads, neurons) of all that fits, with the parameters written out."""
    found = set()
    for layers in (1, 2, 3, 4):
        for embed in (8, 16):
            for kv_heads in (1, 2, 3, 4):
                heads = 2 * kv_heads

                def parameters(neurons):
                    attention = embed * 8 * 2 * (heads + kv_heads)  # noqa: B023
                    block = attention + 3 * embed * neurons + 2 * embed  # noqa: B023
                    return layers * block + embed + 31 * embed  # noqa: B023

                best = min((8, 16, 24), key=lambda n: abs(parameters(n) - budget))
                if abs(parameters(best) / budget - 1) <= tolerance:
                    found.add((layers, embed, kv_heads, best))
    return found


@pytest.mark.parametrize(("budget", "tolerance"), [(4000, 0.05), (7000, 0.1), (3000, 0.2)])
def test_shapes_are_those_of_the_grid_that_fit(budget, tolerance):
    config = SearchConfig(budgets=(budget,), tolerance=tolerance, steps=4)
    got = {(c.layers, c.embed, c.kv_heads, c.mlp) for c in candidate_shapes(SOURCE, config)}
    assert got
    assert got == by_hand(budget, tolerance)


def test_costs_by_hand():
    assert cost_of(models.SMOLLM2_135M, "parameters") == 134_515_008
    # All of a tied model's weights, and 30 layers x 3 heads x 64 channels of keys and of values.
    want = 2 * (134_515_008 + 2 * 30 * 3 * 64 * 1000)
    assert cost_of(models.SMOLLM2_135M, "decode_bytes", 1000) == want
    untied = dataclasses.replace(models.SMOLLM2_135M, tied=False)
    assert cost_of(untied, "decode_bytes", 1000) == want


def test_budgets_in_bytes_and_several_of_them():
    config = SearchConfig(
        budgets=(8000.0, 14000.0), cost="decode_bytes", tolerance=0.05, steps=4, context=16
    )
    costs = np.array([cost_of(s, "decode_bytes", 16) for s in candidate_shapes(SOURCE, config)])
    near = np.abs(costs[:, None] / [8000, 14000] - 1) <= 0.05
    assert near.any(axis=0).all()
    assert near.any(axis=1).all()


@pytest.mark.slow
def test_losses_are_the_students_and_one_program_serves_all_shapes():
    model, scores = tiny.model(SOURCE), tiny.random_scores(SOURCE)
    config = SearchConfig(budgets=(5000,), tolerance=0.1, steps=4, repair_best=1)
    before = batch_loss._cache_size()
    found = search(model, scores, ROWS, config)
    # One for the masked model, one for the repaired student.
    assert batch_loss._cache_size() - before == 2
    assert [c.loss for c in found] == sorted(c.loss for c in found)
    assert len({c.shape for c in found}) == len(found) > 3
    batch = {name: np.concatenate([b[name] for b in ROWS]) for name in ROWS[0]}
    for candidate in found[:3]:
        plan = make_plan(scores, SOURCE, candidate.shape)
        student = apply_plan(plan, model.params)
        want = mean_loss(candidate.shape, student, batch)
        np.testing.assert_allclose(candidate.loss, want, rtol=1e-5)
        assert candidate.cost == sum(x.size for x in jax.tree.leaves(student))
    plan = make_plan(scores, SOURCE, found[0].shape)
    repaired = apply_plan(plan, repair(plan, model.params, grams(model, plan, ROWS)))
    want = mean_loss(found[0].shape, repaired, batch)
    np.testing.assert_allclose(found[0].repaired_loss, want, rtol=1e-5)
    assert found[1].repaired_loss is None


@pytest.mark.slow
def test_layers_that_do_nothing_go_first():
    """Half of the layers are silent: the best shape at that cost is a shallow one, not a thin."""
    model = tiny.model(SOURCE, scale=0.4)
    params = jax.tree.map(np.array, model.params)
    for block, name in (("attention", "output"), ("mlp", "down")):
        params["layers"][block][name][[0, 2]] = 0
    scores = dataclasses.replace(
        tiny.random_scores(SOURCE), layers=np.array([0.1, 1, 0.2, 1], np.float32)
    )
    batch = tiny.rows(4)
    # Rows that the model itself finds likely, so that a smaller model is a worse one.
    for t in range(11):
        logits = models.logits(SOURCE, params, batch["tokens"], batch["segment_ids"])
        batch["tokens"][:, t + 1] = np.argmax(logits[:, t], axis=-1)
    shallow = dataclasses.replace(SOURCE, layers=2)
    config = SearchConfig(budgets=(shallow.parameters,), steps=4)
    best = search(models.Model(SOURCE, params), scores, [batch], config)[0]
    assert best.shape == shallow


def test_pareto_equals_brute_force():
    random = np.random.default_rng(0)
    candidates = [
        Candidate(shape=SOURCE, cost=float(cost), loss=float(loss))
        for cost, loss in random.integers(0, 12, (60, 2))
    ]

    def beaten(one):
        return any(
            (other.cost <= one.cost and other.loss < one.loss)
            or (other.cost < one.cost and other.loss <= one.loss)
            for other in candidates
        )

    want = {(c.cost, c.loss) for c in candidates if not beaten(c)}
    front = [(c.cost, c.loss) for c in pareto(candidates)]
    assert front == sorted(want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": ()}, r"budgets are \(\); give at least one"),
        ({"budgets": (-1.0,)}, "all positive"),
        ({"budgets": (1.0,), "cost": "flops"}, "cost is 'flops'; choose one of parameters"),
        ({"budgets": (1.0,), "tolerance": 1.5}, r"tolerance is 1\.5"),
        ({"budgets": (1.0,), "steps": 0}, "steps must be positive"),
    ],
)
def test_wrong_fields(options, message):
    with pytest.raises(InputError, match=message):
        SearchConfig(**options)


def test_a_budget_that_nothing_fits():
    with pytest.raises(InputError, match=r"no shape .* has 100 parameters .* the source has"):
        candidate_shapes(SOURCE, SearchConfig(budgets=(100,)))
