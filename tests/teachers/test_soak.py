"""A few of all the faults that `scripts/soak.py` puts stores of targets through."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_few_faults_of_every_kind_lose_nothing():
    # In a process of its own, because it forks.
    run = subprocess.run(
        [sys.executable, ROOT / "scripts" / "soak.py", "targets", "--part", "50", "--json"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    counted = json.loads(run.stdout.splitlines()[-1])
    assert counted["lost"] == 0
    assert counted["survived"] == counted["tried"] > 400
    for kind in ("random moment", "write, fsync", "disk full", "shard flipped", "shard cut short"):
        assert kind in run.stderr
