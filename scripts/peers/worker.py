"""One contender in its own process: checked, then run whenever a line comes in.

Reads the contender and the shape as one line of JSON, then runs once for every further line and
answers with seconds and with the growth of the resident set in bytes. Linux only: it resets and
reads the peak in /proc/self.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import sys
import time

import numpy as np
import problem
from contenders import CONTENDERS

TOLERANCE = 1e-4


def main() -> None:
    # Libraries print too: answers go to the real standard output, everything else to stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = json.loads(sys.stdin.readline())
    shape = problem.Shape(**job["shape"])
    serve = _floor(shape) if job["name"] == "floor" else _contender(job, shape)
    for answer in serve:
        print(json.dumps(answer), file=answers)
        if not sys.stdin.readline():
            return


def _floor(shape):
    """Yields the seconds of each of the three products."""
    runs, tiles = importlib.import_module("jax_losses").floor(shape)
    for run in runs:
        run()
    yield {"ready": True}
    while True:
        yield {"seconds": [tiles * _timed(run)[0] for run in runs]}


def _contender(job, shape):
    contender = next(one for one in CONTENDERS if one.name == job["name"])
    module = importlib.import_module(f"{contender.framework}_losses")
    error = check(contender, module, job["site"])
    if not error <= TOLERANCE:
        raise SystemExit(f"differs from NumPy by {error:.1e}: another loss, not measured")
    arrays = problem.make(shape, contender.teacher)
    run = module.build(contender.name, arrays, job["site"])
    del arrays
    yield {"ready": True, "error": error}
    while True:
        before = _start_peak()
        seconds, result = _timed(run)
        growth = _resident("VmHWM") - before
        del result
        yield {"seconds": seconds, "growth": growth}


def check(contender, module, site=None, dtype="float32") -> float:
    """Largest error of loss and gradients on a small problem, relative to each one's largest."""
    arrays = problem.make(problem.CHECK, contender.teacher, dtype)
    given = dict(arrays)
    if contender.teacher == "head":
        hidden, unembedding = given["teacher_hidden"], given["teacher_unembedding"]
        given["teacher_logits"] = hidden.astype(np.float32) @ unembedding.astype(np.float32)
    wanted = problem.answer(contender.objective, given)
    if contender.omits_entropy:
        wanted = (wanted[0] + problem.SOFT * problem.teacher_entropy(given), *wanted[1:])
    got = module.build(contender.name, arrays, site)()
    pairs = [(_float64(a), np.asarray(b)) for a, b in zip(got, wanted)]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def _float64(value) -> np.ndarray:
    if hasattr(value, "cpu"):  # NumPy reads no tensor on a GPU and none in bfloat16
        value = value.double().cpu()
    return np.asarray(value, np.float64)


def _timed(run):
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def _start_peak() -> int:
    """Gives free memory back, lets the peak start anew and returns where it starts."""
    gc.collect()
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _resident("VmRSS")


def _resident(field: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field + ":"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main()
