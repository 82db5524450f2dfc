import dataclasses
import json

import numpy as np
import pytest
import tiny

from distill_jax.artifacts import InputError
from distill_jax.pruning import Plan, make_plan

TARGET = dataclasses.replace(
    tiny.SOURCE, layers=2, embed=7, mlp=9, heads=4, kv_heads=2, head_dim=4, tied=True
)
SCORES = tiny.random_scores(tiny.SOURCE)


def replaced(**sizes):
    return dataclasses.replace(tiny.SOURCE, **sizes)


def test_the_highest_scores_survive():
    plan = make_plan(SCORES, tiny.SOURCE, TARGET)
    assert set(plan.layers) == set(sorted(range(4), key=lambda i: SCORES.layers[i])[2:])
    assert set(plan.embed) == set(sorted(range(12), key=lambda i: SCORES.embed[i])[5:])
    for new, old in enumerate(plan.layers):
        assert set(plan.mlp[new]) == set(sorted(range(20), key=lambda i: SCORES.mlp[old, i])[11:])
        kept = sorted(sorted(range(4), key=lambda i: SCORES.kv_heads[old, i])[2:])
        np.testing.assert_array_equal(plan.kv_heads[new], kept)
        np.testing.assert_array_equal(plan.heads[new], [2 * k + i for k in kept for i in (0, 1)])


def test_fewer_query_heads_for_each_key_value_head():
    plan = make_plan(SCORES, tiny.SOURCE, replaced(heads=4))
    for layer, kept in enumerate(plan.heads):
        pairs = SCORES.heads[layer].reshape(4, 2)
        np.testing.assert_array_equal(kept, np.arange(0, 8, 2) + pairs.argmax(1))


def test_contiguous_layers():
    scores = dataclasses.replace(SCORES, layers=np.array([0.1, 0.9, 0.3, 0.2], np.float32))
    kept = {
        choice: make_plan(scores, tiny.SOURCE, replaced(layers=2), layer_choice=choice).layers
        for choice in ("influence", "contiguous")
    }
    np.testing.assert_array_equal(kept["influence"], [1, 2])
    np.testing.assert_array_equal(kept["contiguous"], [0, 1])
    whole = make_plan(scores, tiny.SOURCE, tiny.SOURCE, layer_choice="contiguous").layers
    np.testing.assert_array_equal(whole, range(4))


def test_layers_by_perplexity():
    """The layers without which the loss is lowest go first, whatever their influence."""
    removal = np.array([3.0, 2.1, 2.0, 2.5], np.float32)
    scores = dataclasses.replace(SCORES, removal=removal)
    plan = make_plan(scores, tiny.SOURCE, replaced(layers=2), layer_choice="perplexity")
    np.testing.assert_array_equal(plan.layers, [0, 3])
    with pytest.raises(InputError, match="scores lack the losses without each layer"):
        make_plan(SCORES, tiny.SOURCE, replaced(layers=2), layer_choice="perplexity")
    removal[1] = np.inf
    with pytest.raises(InputError, match=r"scores\.removal holds NaN"):
        make_plan(scores, tiny.SOURCE, replaced(layers=2), layer_choice="perplexity")


MERGED = {"heads": 6, "kv_heads": 2}


def test_merged_key_value_heads_serve_the_best_of_all_their_query_heads():
    plan = make_plan(SCORES, tiny.SOURCE, replaced(**MERGED), kv_choice="merge")
    np.testing.assert_array_equal(plan.merged_kv_heads, [[[0, 1], [2, 3]]] * 4)
    np.testing.assert_array_equal(plan.kv_heads, [[0, 2]] * 4)
    for layer, kept in enumerate(plan.heads):
        scores = SCORES.heads[layer]
        halves = [sorted(sorted(h, key=lambda i: scores[i])[1:]) for h in (range(4), range(4, 8))]
        np.testing.assert_array_equal(kept, halves[0] + halves[1])
    plan.check()


def test_merging_is_written_and_read(tmp_path):
    plan = make_plan(SCORES, tiny.SOURCE, replaced(layers=2, **MERGED), kv_choice="merge")
    plan.save(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["merged_kv_heads"] == [
        ["0-1", "2-3"],
        ["0-1", "2-3"],
    ]
    loaded = Plan.load(tmp_path / "plan.json")
    np.testing.assert_array_equal(loaded.merged_kv_heads, plan.merged_kv_heads)
    assert plan.diff(loaded) == []
    dropped = make_plan(SCORES, tiny.SOURCE, replaced(layers=2))
    assert any(line.startswith("merged_kv_heads") for line in dropped.diff(plan))


@pytest.mark.parametrize(
    ("merged", "message"),
    [
        ([["0-1", "1-2"]] * 4, "none twice"),
        ([["1-2", "0 3"]] * 4, "each kept key/value head first"),
        ([["0 3", "2 4"]] * 4, "none twice"),
        ([["0-1", "2-3"]] * 3, "one list for each"),
        ([["0 2", "1 3"]] * 4, "each kept key/value head first"),
        ([["0 3", "2 1"]] * 4, "separates query heads"),
        ([["0-1", "2-x"]] * 4, "not a pruning plan"),
    ],
)
def test_damaged_merging(tmp_path, merged, message):
    plan = make_plan(SCORES, tiny.SOURCE, replaced(**MERGED), kv_choice="merge")
    value = plan.to_json() | {"merged_kv_heads": merged}
    (tmp_path / "plan.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=message) as error:
        Plan.load(tmp_path / "plan.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sizes", "kv_choice", "message"),
    [
        ({"heads": 6, "kv_heads": 3}, "merge", r"target\.kv_heads is 3; the source's 4 key/value"),
        ({"heads": 6, "kv_heads": 2}, "drop", "target has 3 query heads for each key/value head"),
        ({"heads": 4, "kv_heads": 2}, "mean", "kv_choice is 'mean'; choose one of drop, merge"),
    ],
)
def test_impossible_merging(sizes, kv_choice, message):
    with pytest.raises(InputError, match=message):
        make_plan(SCORES, tiny.SOURCE, replaced(**sizes), kv_choice=kv_choice)


def test_rotary_pairs_keep_the_targets_frequencies():
    np.testing.assert_array_equal(
        make_plan(SCORES, tiny.SOURCE, replaced(head_dim=4)).head_dim, [0, 2, 4, 6]
    )
    slower = replaced(head_dim=4, rope_theta=tiny.SOURCE.rope_theta**0.5)
    np.testing.assert_array_equal(make_plan(SCORES, tiny.SOURCE, slower).head_dim, [0, 1, 4, 5])
    for wrong in (replaced(head_dim=6), replaced(head_dim=4, rope_theta=5e4)):
        with pytest.raises(InputError, match=r"target\.head_dim .* rotary frequencies"):
            make_plan(SCORES, tiny.SOURCE, wrong)


def test_norm_scales_undo_the_change_of_the_mean_square():
    """Tokens of unequal loudness: kept channels keep their mean square after the norm."""
    random = np.random.default_rng(0)
    stream = (
        random.normal(size=(500, 12)) * np.linspace(0.2, 3, 12) * random.lognormal(size=(500, 1))
    )
    before = stream / np.sqrt((stream**2).mean(-1, keepdims=True))
    power = np.tile((before**2).mean(0).astype(np.float32), (4, 1))
    plan = make_plan(dataclasses.replace(SCORES, mlp_power=power), tiny.SOURCE, TARGET)
    kept = stream[:, plan.embed]
    after = kept / np.sqrt((kept**2).mean(-1, keepdims=True)) * plan.norm_scales["mlp"][1]
    np.testing.assert_allclose((after**2).mean(), (before[:, plan.embed] ** 2).mean(), rtol=1e-5)


def test_norm_scales_are_one_when_no_channel_goes():
    plan = make_plan(SCORES, tiny.SOURCE, replaced(layers=2, mlp=9))
    for scales in plan.norm_scales.values():
        np.testing.assert_array_equal(scales, 1.0)


def test_file_is_readable_and_comes_back(tmp_path):
    plan = make_plan(SCORES, tiny.SOURCE, TARGET)
    plan.save(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["kept"]["head_dim"] == "0 2 4 6"
    loaded = Plan.load(tmp_path / "plan.json")
    for field in dataclasses.fields(Plan):
        mine, theirs = getattr(plan, field.name), getattr(loaded, field.name)
        if field.name == "norm_scales":
            assert mine.keys() == theirs.keys()
            assert all((mine[name] == theirs[name]).all() for name in mine)
        else:
            np.testing.assert_array_equal(mine, theirs)
    assert plan.diff(loaded) == []


def test_diff_names_the_layer():
    plan = make_plan(SCORES, tiny.SOURCE, TARGET)
    mlp = plan.mlp.copy()
    mlp[1] = np.arange(9)
    assert plan.diff(dataclasses.replace(plan, mlp=mlp))[0].startswith("kept.mlp.1: '")
    assert len(plan.diff(dataclasses.replace(plan, mlp=mlp))) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed": list(range(7))}, "not a pruning plan"),
        ({"embed": "0-5 12"}, r"plan\.embed leaves the source's range 0 to 11"),
        ({"embed": "0-5 5"}, r"plan\.embed keeps an index twice"),
        ({"embed": "0-5"}, r"plan\.embed has shape \(6,\); the target needs \(7,\)"),
        ({"heads": ["0-3", "0 2 4 6"]}, r"plan\.heads separates query heads"),
        ({"vocab": "0-5"}, "not a pruning plan"),
    ],
)
def test_damaged_files(tmp_path, change, message):
    value = make_plan(SCORES, tiny.SOURCE, TARGET).to_json()
    value["kept"] |= {"kv_heads": ["0-1", "0-1"], "heads": ["0-3", "0-3"]} | change
    (tmp_path / "plan.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=message) as error:
        Plan.load(tmp_path / "plan.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"mlp": 21}, r"target\.mlp is 21, larger than the source's 20"),
        ({"layers": 5}, r"target\.layers is 5, larger"),
        ({"vocab_size": 30}, r"target\.vocab_size is 30; pruning keeps the source's 31"),
        ({"norm_eps": 1e-6}, r"target\.norm_eps is 1e-06"),
        ({"heads": 8, "kv_heads": 2}, "target has 4 query heads for each key/value head"),
    ],
)
def test_impossible_targets(sizes, message):
    with pytest.raises(InputError, match=message):
        make_plan(SCORES, tiny.SOURCE, replaced(**sizes))


def test_heads_must_divide():
    with pytest.raises(InputError, match="not a multiple of kv_heads"):
        replaced(heads=5, kv_heads=2)


def test_untying_is_refused():
    with pytest.raises(InputError, match=r"target\.tied is False"):
        make_plan(SCORES, replaced(tied=True), tiny.SOURCE)


def test_wrong_scores():
    mlp = SCORES.mlp.copy()
    mlp[1, 2] = np.nan
    with pytest.raises(InputError, match=r"scores\.mlp holds NaN or infinity"):
        make_plan(dataclasses.replace(SCORES, mlp=mlp), tiny.SOURCE, TARGET)
    with pytest.raises(InputError, match=r"scores\.layers has shape \(4,\), but .* \(3,\)"):
        make_plan(SCORES, replaced(layers=3), TARGET)
    with pytest.raises(InputError, match="layer_choice is 'first'; choose one of influence"):
        make_plan(SCORES, tiny.SOURCE, TARGET, layer_choice="first")
