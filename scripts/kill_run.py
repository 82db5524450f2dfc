"""Kills a cut of the tiny recipe in many stages: it must end with the bits of one left in peace.

    python scripts/kill_run.py           # at every point of POINTS; some minutes
    python scripts/kill_run.py --json    # ends with one line of JSON

Ends with status 1 if a difference was found. The tests do the same at fewer points.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping

import jax
import numpy as np

from distill_jax import models, parallel
from distill_jax.training import read_metrics

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "tiny.py"
MODELS = (
    "teachers/small",
    "teachers/large",
    "prune",
    "distill/seed-0",
    "controls/cross_entropy/seed-0",
    "controls/random_start/seed-0",
    "sft",
    "rejection-sample",
    "dpo",
)


@dataclasses.dataclass(frozen=True)
class Point:
    """Where to end a run.

    Attributes:
      stage: the stage.
      sign: what must be there first, a pattern of files in the stage's directory.
      way: the signal.
      brief: whether this is the stage's last file, so that at times it ends before the kill comes.
    """

    stage: str
    sign: str
    way: signal.Signals
    brief: bool = False


_CHECKPOINT = "checkpoints/*/_CHECKPOINT_METADATA"
# From the start of a stage to its very end.
POINTS = (
    Point("corpus", "started.json", signal.SIGKILL),
    Point("targets/large", "*/*array_record-00001*", signal.SIGTERM),
    Point("prune", "plan.json", signal.SIGKILL, brief=True),
    Point("distill/seed-0", _CHECKPOINT, signal.SIGKILL),
    Point("distill/seed-0", "model.json", signal.SIGKILL, brief=True),
    Point("rejection-sample", "samples/part-*.jsonl", signal.SIGKILL),
    Point("dpo", _CHECKPOINT, signal.SIGTERM),
)


def start(out: pathlib.Path, environment: Mapping[str, str]) -> subprocess.Popen:
    """The recipe in a process of its own, on one device."""
    command = [sys.executable, "-m", "distill_jax.cli", "run", str(CONFIG)]
    command += ["--set", "size=test", "--out", str(out), "--json"]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(out: pathlib.Path, environment: Mapping[str, str]) -> str:
    """Runs it to its end; gives what it printed."""
    process = start(out, environment)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    return printed


def kill_in(out: pathlib.Path, point: Point, environment: Mapping[str, str]) -> bool:
    """Starts the run and ends it at a point; whether that was before the stage's end.

    Told to stop, it says that it can be gone on with, and no checkpoint lags behind its metrics.
    Some files live for milliseconds; a stage that ended all the same counts as not disturbed.
    """
    process = start(out, environment)
    place = out / point.stage
    while process.poll() is None and not (place / "manifest.json").exists():
        if next(place.glob(point.sign), None):
            break
        time.sleep(0.002)
    assert process.poll() is None, process.communicate()[1][-3000:]
    process.send_signal(point.way)
    errors = process.communicate()[1]
    if point.way == signal.SIGTERM:
        assert process.returncode == parallel.EXIT_AGAIN, errors[-3000:]
        assert errors.endswith("; the same command goes on from here\n")
        if stop := re.search(r"stopped after step (\d+)", errors):
            newest = max(int(step.name) for step in place.glob("checkpoints/[0-9]*"))
            assert newest == int(stop[1]) == len(read_metrics(place / "metrics.jsonl"))
    return not (place / "manifest.json").exists()


def kill_and_finish(
    out: pathlib.Path, points: Iterable[Point], environment: Mapping[str, str]
) -> list[Point]:
    """Ends a run at points, one after the other, and then lets it end; those that came too late."""
    missed = [point for point in points if not kill_in(out, point, environment)]
    assert all(point.brief for point in missed), missed
    finish(out, environment)
    return missed


def assert_same(whole: pathlib.Path, other: pathlib.Path) -> None:
    """Two runs have the same models, metrics, samples, exports and targets, bit for bit."""
    for stage in MODELS:
        expected, actual = (models.load(out / stage).params for out in (whole, other))
        jax.tree.map(np.testing.assert_array_equal, actual, expected)
        if (whole / stage / "metrics.jsonl").exists():
            lines = [read_metrics(out / stage / "metrics.jsonl") for out in (whole, other)]
            assert lines[0] == lines[1], stage
    for file in ("rejection-sample/samples/samples.jsonl", "export/model.safetensors"):
        assert (other / file).read_bytes() == (whole / file).read_bytes(), file
    stores = [store for store in whole.glob("targets/*/*") if store.is_dir()]
    for file in (path for store in stores for path in store.rglob("*") if path.is_file()):
        name = file.relative_to(whole)
        assert (other / name).read_bytes() == file.read_bytes(), name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    with tempfile.TemporaryDirectory() as directory:
        whole, other = (pathlib.Path(directory, name) for name in ("whole", "killed"))
        finish(whole, environment)
        missed = kill_and_finish(other, POINTS, environment)
        try:
            assert_same(whole, other)
        except AssertionError as difference:
            print(difference, file=sys.stderr)
            same = False
        else:
            same = True
    if options.json:
        print(json.dumps({"kills": len(POINTS) - len(missed), "same": same}))
    else:
        print(f"{len(POINTS) - len(missed)} kills, {'the same' if same else 'other'} bits")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
