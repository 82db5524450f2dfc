"""Prunes files of Llama 3.1 8B's shape to the 1B, and shows the memory and the time it took.

    python scripts/prune_files_8b.py --place /tmp --json     # needs 19 GB of disk there
    python scripts/prune_files_8b.py --place /tmp --layers 4 # a slice: 4 layers to 2

The files hold random bfloat16 numbers and are deleted in the end. The pruning runs in a process of
its own; its memory is the largest resident size, mapped files included.
"""

import argparse
import dataclasses
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests" / "pruning"))

import tiny

from distill_jax import models, pruning
from distill_jax.models import presets

WORK = """
import sys
from distill_jax import pruning
plan, source, out = sys.argv[1:]
pruning.prune_files(pruning.Plan.load(plan), source, out)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--place", required=True, help="a folder with room for the files")
    parser.add_argument("--layers", type=int, default=32, help="of the 8B; half of them stay")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    source = dataclasses.replace(presets.LLAMA_3_1_8B, layers=options.layers)
    target = dataclasses.replace(presets.LLAMA_3_2_1B, layers=max(options.layers // 2, 1))
    with tempfile.TemporaryDirectory(dir=options.place) as place:
        folder = pathlib.Path(place)
        write_random(folder / "source", source)
        plan = pruning.make_plan(tiny.random_scores(source), source, target)
        plan.save(folder / "plan.json")
        paths = [str(folder / name) for name in ("plan.json", "source", "out")]
        start = time.monotonic()
        subprocess.run([sys.executable, "-c", WORK, *paths], check=True)
        seconds = time.monotonic() - start
        sizes = {name: size_of(folder / name) for name in ("source", "out")}
        shape, tensors = models.open_hugging_face(folder / "out")
        stored = sum(int(np.prod(tensor.shape)) for tensor in tensors.values())
    assert shape == target, shape
    figures = {
        "layers": options.layers,
        "source_bytes": sizes["source"],
        "out_bytes": sizes["out"],
        "out_parameters": stored,
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,
        "seconds": round(seconds, 1),
    }
    if options.json:
        print(json.dumps(figures))
    else:
        print(", ".join(f"{name} {value:,}" for name, value in figures.items()))


def write_random(folder: pathlib.Path, shape: models.LlamaConfig) -> None:
    block = np.random.default_rng(0).standard_normal(1 << 20, np.float32)
    block = (0.02 * block).astype(ml_dtypes.bfloat16)
    models.write_hugging_face(
        folder,
        shape,
        lambda slot: np.resize(block, slot.shape),
        dtype=ml_dtypes.bfloat16,
        max_shard_bytes=1_200_000_000,
    )


def size_of(folder: pathlib.Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


if __name__ == "__main__":
    main()
