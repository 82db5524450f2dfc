"""Time and memory of the losses beside their peers, on a GPU, in bfloat16.

    python scripts/bench_losses_gpu.py                   # all contenders that are installed
    python scripts/bench_losses_gpu.py --only 'ours-*'

The problem is that of bench_losses.py, at the size of a 1B student's head: hidden states and
unembedding, and a teacher's logits, are bfloat16, the loss float32. It needs JAX for the GPU, and
for the peers PyTorch and liger-kernel, in one environment. Every contender has a process of its own
and first has to give the loss and gradients of a float64 computation to within bfloat16's rounding.

Time is the median run. "over floor" is that over the matrix products alone, as fast as XLA does
them here. Extra memory is over holding the inputs, gradients included: what PyTorch's allocator
reached, and what XLA's plan of buffers sets aside.
"""

import argparse
import dataclasses
import fnmatch
import importlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "peers"), str(HERE.parent)]

import problem  # noqa: E402
import worker  # noqa: E402
from contenders import CONTENDERS  # noqa: E402

FULL = problem.Shape(tokens=8192, embed=2048, vocab=128256, ids=64)
DTYPE = "bfloat16"
TOLERANCE = 2e-2
WARM_UPS, RUNS = 3, 15
LEFT_OUT = ("tunix-dense", "torchtune-dense", "trl-chunked")
"""Not made for it, or slower than others by far."""


def measure(name: str, shape: problem.Shape) -> dict:
    """One contender, in this process."""
    import ml_dtypes  # noqa: F401  # makes bfloat16 known to NumPy

    if name == "floor":
        runs, tiles = importlib.import_module("jax_losses").floor(shape, DTYPE)
        return {"seconds": sum(tiles * _median_seconds(run) for run in runs)}
    contender = next(one for one in CONTENDERS if one.name == name)
    module = importlib.import_module(f"{contender.framework}_losses")
    error = worker.check(contender, module, dtype=DTYPE)
    if not error <= TOLERANCE:
        raise SystemExit(f"differs from NumPy by {error:.1e}: another loss, not measured")
    run = module.build(name, problem.make(shape, contender.teacher, DTYPE), None)
    if contender.framework == "jax":
        extra, synchronised = run.planned_bytes, run
    else:
        import torch

        def synchronised():
            result = run()
            torch.cuda.synchronize()
            return result

        synchronised()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        synchronised()
        extra = torch.cuda.max_memory_allocated() - before
    return {"seconds": _median_seconds(synchronised), "extra": extra, "error": error}


def _median_seconds(run) -> float:
    seconds = []
    for turn in range(WARM_UPS + RUNS):
        start = time.perf_counter()
        run()
        if turn >= WARM_UPS:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def in_process(name: str, shape: problem.Shape) -> dict:
    command = [sys.executable, __file__, "--one", name, "--shape", *map(str, _sizes(shape))]
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"failure": (done.stderr.strip().splitlines() or ["no words"])[-1][:100]}
    return json.loads(done.stdout.splitlines()[-1])


def _sizes(shape: problem.Shape) -> tuple[int, ...]:
    return dataclasses.astuple(shape)


def main() -> None:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="contenders")
    parser.add_argument(
        "--shape", nargs=4, type=int, default=_sizes(FULL), metavar=("N", "D", "V", "K")
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = problem.Shape(*args.shape)
    if args.one:
        print(json.dumps(measure(args.one, shape)))
        return
    print("N, D, V, K =", *_sizes(shape), flush=True)
    floor = in_process("floor", shape)
    if "failure" in floor:
        raise SystemExit(floor["failure"])
    flops = 6 * shape.tokens * shape.embed * shape.vocab
    rate = flops / floor["seconds"] / 1e12
    print(f"matrix products {1e3 * floor['seconds']:.1f} ms, {rate:.0f} TFLOP/s", flush=True)
    head = f"{'contender':22} {'ms':>8} {'over floor':>10} {'extra GB':>9} {'off by':>8}"
    print(head, flush=True)
    for contender in CONTENDERS:
        name = contender.name
        if name in LEFT_OUT or not any(fnmatch.fnmatch(name, one) for one in args.only):
            continue
        found = in_process(name, shape)
        if "failure" in found:
            print(f"{name:22} {found['failure']}", flush=True)
            continue
        over = found["seconds"] / floor["seconds"] * 3 / contender.products
        print(
            f"{name:22} {1e3 * found['seconds']:8.1f} {over:10.2f} {found['extra'] / 1e9:9.2f} "
            f"{found['error']:8.0e} {contender.note}",
            flush=True,
        )


if __name__ == "__main__":
    main()
