"""Figures against a float64 NumPy oracle that sees one token at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import data, models, parallel
from distill_jax.artifacts import InputError
from distill_jax.evaluation import EvaluationConfig, SpeedConfig, evaluate, measure_speed

VOCAB, LENGTH = 53, 12


def tiny(seed, *, scale=0.25, **changes):
    shape = {"vocab_size": VOCAB, "embed": 16, "mlp": 24, "layers": 2, "heads": 4, "kv_heads": 2}
    shape |= {"head_dim": 8, "tied": True, "context": 64, **changes}
    config = models.LlamaConfig(**shape)
    rng = np.random.default_rng(seed)
    # Far from uniform, so that calibration and agreement have something to say.
    params = jax.tree.map(
        lambda p: jnp.asarray(rng.normal(0, scale, p.shape), p.dtype),
        models.abstract_params(config),
    )
    return models.Model(config, params)


@pytest.fixture(scope="module")
def family():
    return {
        "teacher": tiny(0),
        "other": tiny(1, tied=False, scale=0.4),
        "student": tiny(2, embed=8, heads=2, kv_heads=1),
    }


def row(rng, segments, padding=0):
    ids = np.concatenate([np.full(n, i + 1) for i, n in enumerate(segments)])
    segment_ids = np.pad(ids, (0, padding)).astype(np.int32)
    return {"tokens": rng.integers(0, VOCAB, LENGTH, np.int32), "segment_ids": segment_ids}


@pytest.fixture(scope="module")
def splits():
    rng = np.random.default_rng(7)
    shapes = [((12,), 0), ((5, 7), 0), ((4, 3), 5), ((1, 1, 10), 0), ((2,), 10)]
    return {"held_out": [row(rng, *s) for s in shapes], "other": [row(rng, (3, 6), 3)]}


@pytest.fixture(scope="module")
def plain(family, splits):
    """Figures in batches of two rows, all tokens of a batch in one chunk."""
    return evaluate(family, ["teacher", "other"], splits, settings())


def settings(batch_rows=2, chunk_tokens=1000):
    return EvaluationConfig(batch_rows=batch_rows, chunk_tokens=chunk_tokens, speed=None)


logits_of = jax.jit(models.logits, static_argnums=0)


def log_probs(model, record):
    """[T, V] in float64, each document alone at the start of a row of its own."""
    rows = np.full((LENGTH, VOCAB), np.nan)
    for segment in set(record["segment_ids"].tolist()) - {0}:
        at = np.flatnonzero(record["segment_ids"] == segment)
        tokens, ids = np.zeros((2, 1, LENGTH), np.int32)
        tokens[0, : len(at)], ids[0, : len(at)] = record["tokens"][at], 1
        logits = np.asarray(logits_of(model.config, model.params, tokens, ids)[0], np.float64)
        logits = logits[: len(at)]
        top = logits.max(axis=1, keepdims=True)
        rows[at] = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    return rows


def oracle(model, teachers, records):
    losses, correct, confidence = [], [], []
    kl = {name: [] for name in teachers}
    agreement = {name: [] for name in teachers}
    for record in records:
        ours = log_probs(model, record)
        theirs = {name: log_probs(teacher, record) for name, teacher in teachers.items()}
        for t in range(LENGTH - 1):
            if not record["segment_ids"][t] or np.diff(record["segment_ids"])[t]:
                continue
            label = record["tokens"][t + 1]
            losses.append(-ours[t, label])
            correct.append(float(ours[t].argmax() == label))
            confidence.append(np.exp(ours[t].max()))
            for name, other in theirs.items():
                kl[name].append((np.exp(other[t]) * (other[t] - ours[t])).sum())
                agreement[name].append(float(other[t].argmax() == ours[t].argmax()))
    correct, confidence = np.array(correct), np.array(confidence)
    calibration = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        if inside.any():
            gap = correct[inside].mean() - confidence[inside].mean()
            calibration += inside.mean() * abs(gap)
    return {
        "tokens": len(losses),
        "cross_entropy": np.mean(losses),
        "perplexity": np.exp(np.mean(losses)),
        "top1_accuracy": correct.mean(),
        "calibration_error": calibration,
        "kl": {name: np.mean(values) for name, values in kl.items()},
        "agreement": {name: np.mean(values) for name, values in agreement.items()},
    }


def assert_close(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if isinstance(value, dict):
            assert_close(found[name], value)
        else:
            np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_equals_the_float64_oracle(family, splits, plain):
    found = plain
    teachers = {name: family[name] for name in ("teacher", "other")}
    for name, model in family.items():
        for split, records in splits.items():
            assert_close(found[name][split], oracle(model, teachers, records))
    assert found["student"]["held_out"]["calibration_error"] > 0.01
    assert 0 < found["student"]["held_out"]["agreement"]["teacher"] < 1
    assert found["student"]["held_out"]["kl"]["teacher"] > 0.01
    assert found["teacher"]["held_out"]["kl"]["teacher"] == 0
    assert found["teacher"]["held_out"]["agreement"]["teacher"] == 1


@pytest.mark.parametrize(("batch_rows", "chunk_tokens"), [(1, 5), (8, 17)])
def test_batches_and_chunks_change_nothing(family, splits, plain, batch_rows, chunk_tokens):
    parts = evaluate(family, ["teacher", "other"], splits, settings(batch_rows, chunk_tokens))
    for split in splits:
        assert_close(parts["student"][split], plain["student"][split])


def test_padding_changes_nothing(family, splits, plain):
    changed = []
    for record in splits["held_out"]:
        noise = (record["tokens"] + 11) % VOCAB
        tokens = np.where(record["segment_ids"] == 0, noise, record["tokens"])
        changed.append({**record, "tokens": tokens})
    empty = {"tokens": np.zeros(LENGTH, np.int32), "segment_ids": np.zeros(LENGTH, np.int32)}
    rows = {"held_out": [*changed, empty, empty]}
    padded = evaluate(family, ["teacher", "other"], rows, settings())
    assert_close(padded["student"]["held_out"], plain["student"]["held_out"])


def test_given_labels_and_mask_take_precedence(family, splits):
    record = splits["held_out"][0]
    labels, where = np.full(LENGTH, 4, np.int32), np.arange(LENGTH) == 2
    chosen = {**record, "labels": labels, "where": where}
    student = {"student": family["student"]}
    found = evaluate(student, [], {"held_out": [chosen]}, settings())["student"]["held_out"]
    assert found["tokens"] == 1
    expected = -log_probs(family["student"], record)[2, 4]
    np.testing.assert_allclose(found["cross_entropy"], expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"fsdp": 2, "sequence": 2, "tensor": 2},
        {"fsdp": 2, "sequence": 4},  # rows of 12 tokens do not fall apart
    ],
)
def test_eight_devices_give_what_one_gives(family, splits, plain, sizes):
    assert jax.device_count() == 8
    mesh = parallel.make_mesh(parallel.MeshConfig(**sizes))
    given = []
    for record in splits["held_out"]:
        labels, where = data.next_token_labels(record["tokens"], record["segment_ids"])
        given.append({**record, "labels": labels, "where": where})
    # Three rows divide over neither four devices nor two pairs: the batch is filled up.
    rows = {**splits, "held_out": given}
    spread = evaluate(family, ["teacher", "other"], rows, settings(3), mesh=mesh)
    for name in family:
        for split in splits:
            assert_close(spread[name][split], plain[name][split])


def test_low_precision_parameters(family, splits):
    student = family["student"]
    low = dataclasses.replace(
        student, params=jax.tree.map(lambda p: p.astype("bfloat16"), student.params)
    )
    pair = {"full": student, "low": low}
    found = evaluate(pair, ["full"], splits, settings())["low"]["held_out"]
    assert 0 < found["kl"]["full"] < 0.1


def test_sizes(family, plain):
    found = plain["other"]
    model = family["other"]
    leaves = jax.tree.leaves(model.params)
    assert found["parameters"] == sum(leaf.size for leaf in leaves)
    assert found["non_embedding_parameters"] == found["parameters"] - 2 * VOCAB * 16
    assert found["flops_per_token"] == model.config.flops_per_token(LENGTH)
    assert "prefill_tokens_per_s" not in found


@pytest.mark.slow
def test_speeds_are_measured(family):
    config = SpeedConfig(prefill_tokens=8, new_tokens=2, rows=2, repeats=1)
    found = measure_speed(family["student"], config)
    assert found.keys() == {"prefill_tokens_per_s", "generation_tokens_per_s"}
    assert all(value > 0 for value in found.values())


def test_each_shape_is_timed_once(family, splits, monkeypatch):
    timed = []

    def fake(model, config):
        timed.append(model.config)
        return {"prefill_tokens_per_s": 1.0, "generation_tokens_per_s": 2.0}

    monkeypatch.setitem(evaluate.__globals__, "measure_speed", fake)
    twins = {"a": family["student"], "b": family["student"], "teacher": family["teacher"]}
    config = EvaluationConfig(batch_rows=2, speed=SpeedConfig())
    found = evaluate(twins, [], splits, config)
    assert len(timed) == 2
    assert found["b"]["generation_tokens_per_s"] == 2.0


def test_wrong_inputs_are_named(family, splits):
    with pytest.raises(InputError, match="teacher 'nobody' is not among the models"):
        evaluate(family, ["nobody"], splits, settings())
    with pytest.raises(InputError, match="'teacher' has a vocabulary of 53, 'small' of 31"):
        evaluate({**family, "small": tiny(3, vocab_size=31)}, ["teacher"], splits, settings())
    with pytest.raises(InputError, match="split 'none' has no rows"):
        evaluate(family, [], {"none": []}, settings())
    silent = {"tokens": np.zeros(LENGTH, np.int32), "segment_ids": np.zeros(LENGTH, np.int32)}
    with pytest.raises(InputError, match="split 'held_out' has no token to predict"):
        evaluate(family, [], {"held_out": [silent]}, settings())
    with pytest.raises(InputError, match="chunk_tokens is 0"):
        EvaluationConfig(chunk_tokens=0)
