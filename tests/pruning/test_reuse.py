import dataclasses

import numpy as np
import pytest
import tiny

from distill_jax import models
from distill_jax.artifacts import InputError
from distill_jax.pruning import (
    ImportanceConfig,
    PruneConfig,
    Scores,
    find_or_measure,
    importance,
    prune,
    reuse,
)

ROWS = tiny.split(tiny.rows(8), 4)


@pytest.fixture
def measured(monkeypatch):
    """The methods by which importance was measured, and "removal", as they happen."""
    seen = []

    def watch(name, function):
        def watched(*arguments, **options):
            seen.append(arguments[2].method if name == "importance" else "removal")
            return function(*arguments, **options)

        monkeypatch.setattr(reuse, name, watched)

    watch("importance", reuse.importance)
    watch("removal_losses", reuse.removal_losses)
    return seen


@pytest.mark.slow
def test_the_same_is_not_measured_again(tmp_path, measured):
    model, config = tiny.model(), ImportanceConfig()
    path = tmp_path / "scores.safetensors"
    first = find_or_measure(path, model, ROWS, config, tokenizer="t")
    # Other batches of the same rows; and a caller that does not know the tokenizer.
    again = find_or_measure(path, model, tiny.split(tiny.rows(8), 3), config)
    assert measured == ["activation"]
    for field in dataclasses.fields(Scores):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(first, field.name))
    np.testing.assert_array_equal(first.mlp, importance(model, ROWS, config).mlp)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "config"),
    [
        (tiny.split(tiny.rows(8, seed=1), 4), ImportanceConfig()),
        (ROWS, ImportanceConfig(method="fluctuation")),
        (ROWS, ImportanceConfig(batch_aggregation="mean")),
        (ROWS, ImportanceConfig(method="random", seed=1)),
    ],
)
def test_other_rows_or_another_method_are_measured(tmp_path, measured, rows, config):
    model, path = tiny.model(), tmp_path / "scores.safetensors"
    find_or_measure(path, model, ROWS, ImportanceConfig(), removal_rows=ROWS[:1])
    scores = find_or_measure(path, model, rows, config, removal_rows=ROWS[:1])
    assert measured == ["activation", "removal", config.method]
    np.testing.assert_array_equal(scores.mlp, importance(model, rows, config).mlp)
    np.testing.assert_array_equal(Scores.load(path).mlp, scores.mlp)
    find_or_measure(path, model, rows, config, removal_rows=ROWS[:2])
    assert measured[3:] == ["removal"]


def test_scores_of_another_model_are_refused(tmp_path):
    path = tmp_path / "scores.safetensors"
    theirs = find_or_measure(path, tiny.model(), ROWS, ImportanceConfig()).model
    other = tiny.model(seed=1)
    ours = importance(other, ROWS).model
    before = path.read_bytes()
    with pytest.raises(InputError, match=f"scores of model {theirs}, .* is {ours}") as error:
        prune(other, ROWS, PruneConfig(target=tiny.SOURCE), tmp_path)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before


def test_rows_of_another_tokenizer_are_refused(tmp_path):
    model, config = tiny.model(), PruneConfig(target=tiny.SOURCE, repair=False)
    prune(model, ROWS, config, tmp_path, tokenizer="aaaa")
    with pytest.raises(InputError, match=r"rows by tokenizer aaaa, .* are by bbbb") as error:
        prune(model, ROWS, config, tmp_path, tokenizer="bbbb")
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_prune_by_perplexity_with_merged_heads(tmp_path, measured):
    """The stage measures what its choice of layers needs, once for two targets."""
    model = tiny.model()
    for layers in (3, 2):
        target = dataclasses.replace(tiny.SOURCE, layers=layers, heads=6, kv_heads=2)
        config = PruneConfig(
            target=target, layer_choice="perplexity", kv_choice="merge", removal_rows=3
        )
        student, figures = prune(model, ROWS, config, tmp_path)
        models.logits(target, student.params, ROWS[0]["tokens"])
        removal = Scores.load(tmp_path / "scores.safetensors").removal
        assert figures["kept_layers"] == sorted(np.argsort(-removal)[:layers].tolist())
    assert measured == ["activation", "removal"]
