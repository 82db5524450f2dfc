"""One contender of bench_step.py in its own process: a training step for every line that comes in.

Started as `python step_worker.py NAME FOLDER`, where FOLDER holds the model, as transformers writes
it, rows.npz and settings.json. Answers with its name once it is ready, then with the seconds of a
step, by the clock and of all cores together, its loss, and the gradient's norm before clipping.
"""

import importlib
import json
import os
import pathlib
import sys
import time

import numpy as np


def main() -> None:
    # Libraries print too: answers go to the real standard output, everything else to stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    name, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    settings = json.loads((folder / "settings.json").read_text())
    with np.load(folder / "rows.npz") as file:
        rows = dict(file)
    module = importlib.import_module("jax_steps" if name == "ours" else "torch_steps")
    step = module.build(name, folder, rows, settings)
    print(json.dumps({"ready": name}), file=answers)
    for _ in sys.stdin:
        start, used = time.perf_counter(), time.process_time()
        loss, norm = step()
        answer = {
            "seconds": time.perf_counter() - start,
            "core_seconds": time.process_time() - used,
            "loss": float(loss),
            "gradient_norm": float(norm),
        }
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
