"""What the heat maps colour, how curves are read and averaged."""

import json

import numpy as np
import pytest
from report_example import example_report

from distill_jax.artifacts import InputError
from distill_jax.evaluation import Curve, read_curve
from distill_jax.evaluation.report import plots


def test_kept_cells_have_colour_and_cut_cells_are_grey():
    scores = np.array([[0.1, 1.0], [0.5, 0.0]])
    kept = np.array([[1.0, 0.0], [0.5, 0.0]])
    image = plots.heat_image(scores, kept)
    assert np.ptp(image[0, 0, :3]) > 0.1
    assert image[0, 0, 3] == 1
    for cell in ((0, 1), (1, 1)):
        np.testing.assert_array_equal(image[cell][:3], 0.5)
    assert image[0, 1, 3] > image[1, 1, 3] > 0
    pure, grey = (
        plots.heat_image(scores, np.ones((2, 2))),
        plots.heat_image(scores, np.zeros((2, 2))),
    )
    np.testing.assert_allclose(image[1, 0], (pure[1, 0] + grey[1, 0]) / 2)


def test_kept_mask_counts_from_the_kept_layers():
    mask = plots.kept_mask((4, 3), [0, 2], [[1], [0, 2]])
    expected = [[0, 1, 0], [0, 0, 0], [1, 0, 1], [0, 0, 0]]
    np.testing.assert_array_equal(mask, np.array(expected, bool))


def test_buckets_are_means_of_runs():
    values = np.arange(12.0).reshape(2, 6)
    np.testing.assert_allclose(plots.bucket(values, 3), [[0.5, 2.5, 4.5], [6.5, 8.5, 10.5]])
    np.testing.assert_array_equal(plots.bucket(values, 48), values)
    assert plots.bucket(np.ones((1, 100)), 48).shape == (1, 48)


@pytest.mark.parametrize("layers", [1, 4, 80])
def test_any_number_of_layers_can_be_drawn(layers):
    cut = example_report(1).cut
    few = {
        "block_influence": np.linspace(1.0, 0.001, layers),
        "heads": np.ones((layers, 2)),
        "neurons": np.ones((layers, 7)),
        "kept_layers": [0],
        "kept_heads": [[1]],
        "kept_neurons": [[0, 3]],
        "channels": np.ones(5),
        "kept_channels": [0, 1],
    }
    drawn = plots.cut_plots(type(cut)(sizes=cut.sizes, **few))
    assert drawn.keys() == {"influence", "heads", "neurons", "channels"}
    assert all(svg.startswith("<svg") and svg.endswith("</svg>") for svg in drawn.values())


def test_seeds_are_averaged_where_all_of_them_logged():
    curve = Curve(
        name="x",
        runs=[
            {"tokens": [1.0, 2.0, 3.0], "loss": [9.0, 5.0, 3.0]},
            {"tokens": [2.0, 3.0, 4.0], "loss": [7.0, 1.0, 0.0]},
        ],
    )
    tokens, values = plots.common_steps(curve, "loss")
    np.testing.assert_array_equal(tokens, [2.0, 3.0])
    np.testing.assert_array_equal(values, [[5.0, 3.0], [7.0, 1.0]])


def test_smoothing_is_a_moving_average():
    values = np.random.default_rng(0).normal(size=150)
    expected = [values[max(i - 2, 0) : i + 3].mean() for i in range(150)]
    np.testing.assert_allclose(plots.smooth(values), expected, atol=1e-12)
    np.testing.assert_allclose(plots.smooth(values[:20]), values[:20], atol=1e-12)


def test_a_metric_that_nobody_logs_has_no_panel():
    assert plots.curve_plot(example_report(1).curves, "absent", "curve0") is None


def test_curves_are_read_from_metrics_files(tmp_path):
    lines = [
        {"step": 1, "tokens": 8, "loss": 5.0, "hard": 4.0, "note": "text"},
        {"step": 2, "tokens": 16, "loss": 4.0, "hard": 3.5},
        {"step": 2, "tokens": 16, "loss": 3.9, "hard": 3.4},
        {"step": 3, "tokens": 24, "loss": 3.0, "hard": 2.5, "only_here": 1.0},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    curve = read_curve("distilled", [path])
    assert curve.name == "distilled"
    assert curve.runs[0] == {
        "step": [1.0, 2.0, 3.0],
        "tokens": [8.0, 16.0, 24.0],
        "loss": [5.0, 3.9, 3.0],
        "hard": [4.0, 3.4, 2.5],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no metrics"),
        ("{", "metrics.jsonl:1: not a line of metrics"),
        ('{"step": 1, "loss": 2}', 'no "tokens"'),
        ('{"loss": 2}', "not a line of metrics"),
    ],
)
def test_bad_metrics_files_are_named(tmp_path, text, message):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_curve("x", [path])
    with pytest.raises(InputError, match="no such file"):
        read_curve("x", [tmp_path / "absent"])
