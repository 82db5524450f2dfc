"""Kills a cut of the tiny recipe in many stages: it must end with the bits of one left in peace.

    python scripts/kill_run.py           # at every point of POINTS; some minutes
    python scripts/kill_run.py --json    # ends with one line of JSON

Ends with status 1 and says why if a run failed or the bits differ. The tests do the same at fewer
points.
"""

import argparse
import contextlib
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
from collections.abc import Callable, Iterable, Iterator, Mapping

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


class Failed(Exception):
    """A run that did not end as it should, or two that differ."""


@contextlib.contextmanager
def started(
    out: pathlib.Path, environment: Mapping[str, str]
) -> Iterator[tuple[subprocess.Popen, Callable[[], tuple[int, str, str]]]]:
    """The recipe in a process of its own, on one device, and a function that waits for its end.

    That one gives its status, what it printed and its errors. They go into files: nobody reads a
    pipe while a file is waited for.
    """
    command = [sys.executable, "-m", "distill_jax.cli", "run", str(CONFIG)]
    command += ["--set", "size=test", "--out", str(out), "--json"]
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=environment, stdout=printed, stderr=errors)

        def end() -> tuple[int, str, str]:
            status = process.wait()
            for file in (printed, errors):
                file.seek(0)
            return status, printed.read(), errors.read()

        try:
            yield process, end
        finally:
            process.kill()
            process.wait()


def finish(out: pathlib.Path, environment: Mapping[str, str]) -> str:
    """Runs it to its end; gives what it printed."""
    with started(out, environment) as (_, end):
        status, printed, errors = end()
    _require(status == 0, f"status {status}: {errors[-3000:]}")
    return printed


def kill_in(out: pathlib.Path, point: Point, environment: Mapping[str, str]) -> bool:
    """Starts the run and ends it at a point; whether that was before the stage's end.

    Told to stop, it says that it can be gone on with, and no checkpoint lags behind its metrics.
    Some files live for milliseconds; a stage that ended all the same counts as not disturbed.
    """
    place = out / point.stage
    with started(out, environment) as (process, end):
        while process.poll() is None and not (place / "manifest.json").exists():
            if next(place.glob(point.sign), None):
                break
            time.sleep(0.002)
        running = process.poll() is None
        process.send_signal(point.way)
        status, _, errors = end()
    _require(running, f"{point.stage}: it ended before, with status {status}: {errors[-3000:]}")
    if point.way == signal.SIGTERM:
        said = errors.endswith("; the same command goes on from here\n")
        _require(status == parallel.EXIT_AGAIN and said, f"status {status}: {errors[-3000:]}")
        if stop := re.search(r"stopped after step (\d+)", errors):
            newest = max(int(step.name) for step in place.glob("checkpoints/[0-9]*"))
            lines = len(read_metrics(place / "metrics.jsonl"))
            _require(newest == int(stop[1]) == lines, f"{stop[0]}, of {newest} and {lines}")
    return not (place / "manifest.json").exists()


def kill_and_finish(
    out: pathlib.Path, points: Iterable[Point], environment: Mapping[str, str]
) -> list[Point]:
    """Ends a run at points, one after the other, and then lets it end; those that came too late."""
    missed = [point for point in points if not kill_in(out, point, environment)]
    _require(all(point.brief for point in missed), f"too late for {missed}")
    finish(out, environment)
    return missed


def require_same(whole: pathlib.Path, other: pathlib.Path) -> None:
    """Raises `Failed` unless models, metrics, samples, exports and targets have the same bits."""
    for stage in MODELS:
        both = [models.load(out / stage).params for out in (whole, other)]
        same = jax.tree.map(np.array_equal, *both)
        _require(all(jax.tree.leaves(same)), f"{stage}: other parameters")
        if (whole / stage / "metrics.jsonl").exists():
            lines = [read_metrics(out / stage / "metrics.jsonl") for out in (whole, other)]
            _require(lines[0] == lines[1], f"{stage}: other metrics")
    names = [pathlib.Path("rejection-sample/samples/samples.jsonl")]
    names += [pathlib.Path("export/model.safetensors")]
    stores = [store for store in whole.glob("targets/*/*") if store.is_dir()]
    files = [file for store in stores for file in store.rglob("*") if file.is_file()]
    for name in (*names, *(file.relative_to(whole) for file in files)):
        _require((other / name).read_bytes() == (whole / name).read_bytes(), f"another {name}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise Failed(message)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    with tempfile.TemporaryDirectory() as directory:
        whole, other = (pathlib.Path(directory, name) for name in ("whole", "killed"))
        try:
            finish(whole, environment)
            missed = kill_and_finish(other, POINTS, environment)
            require_same(whole, other)
        except Failed as failure:
            print(f"kill_run: {failure}", file=sys.stderr)
            return 1
    kills = len(POINTS) - len(missed)
    print(json.dumps({"kills": kills}) if options.json else f"{kills} kills, the same bits")
    return 0


if __name__ == "__main__":
    sys.exit(main())
