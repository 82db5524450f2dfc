"""The comparison of students in small: that each learns what it is given, and the statistics."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "train_on_targets.py"


@pytest.mark.slow
def test_a_student_learns_what_it_is_given():
    command = [sys.executable, SCRIPT, "--quick", "--seeds", "0", "--json", "--ways"]
    run = subprocess.run(
        [*command, "dense", "top_k_alone"],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "without_torch"))),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
        },
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    # The teacher hardly knows more than how frequent ids are; twelve of 512 are far from that.
    assert 0 < found["dense"][0]["kl"] < 0.03
    assert found["top_k_alone"][0]["kl"] > 0.2
    stores = found["stores"]
    assert stores["threshold"]["ids"] == pytest.approx(12, rel=0.05)
    assert stores["random_sampling"]["ids"] == pytest.approx(12, rel=0.05)
    assert stores["top_k"]["ids"] == 12
    assert {(one["ours"], one["theirs"]) for one in found["differences"]} == {
        ("top_k_alone", "dense")
    }
    assert "one seed tells nothing of noise" in run.stderr


def test_differences_are_told_from_noise_by_a_paired_t_test(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script = importlib.import_module(SCRIPT.stem)
    rng = np.random.default_rng(0)
    common = rng.standard_normal(3)
    values = {
        "dense": common,
        "threshold": common + 0.1 * rng.standard_normal(3),
        "top_k": common + 1 + 0.1 * rng.standard_normal(3),
    }
    compared = {
        way: [{"cross_entropy": float(x), "kl": float(-x)} for x in some]
        for way, some in values.items()
    }
    found = {(d.figure, d.ours, d.theirs): d for d in script.differences({"stores": {}} | compared)}
    assert len(found) == 2 * 3
    for (figure, ours, theirs), one in found.items():
        sign = 1 if figure == "cross_entropy" else -1
        test = scipy.stats.ttest_rel(sign * values[ours], sign * values[theirs])
        low, high = test.confidence_interval(0.95)
        assert one.paired.mean == pytest.approx((low + high) / 2)
        assert one.half == pytest.approx((high - low) / 2)
        clear = "below" if test.statistic < 0 else "above"
        assert one.outcome == (clear if test.pvalue < 0.05 else "within noise")
    assert found["cross_entropy", "threshold", "dense"].outcome == "within noise"
    assert found["cross_entropy", "threshold", "top_k"].outcome == "below"
    assert found["kl", "top_k", "dense"].outcome == "below"
