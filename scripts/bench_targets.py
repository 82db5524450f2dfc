"""Quality, size and speed of stored targets.

    python scripts/bench_targets.py                   # everything
    python scripts/bench_targets.py --distillkit DIR  # and a checkout of arcee-ai/DistillKit
    python scripts/bench_targets.py --quick --json    # under 50 s, one line of JSON

Targets are `Threshold` samples at a mean of 12 ids a token, in rows of 2048 tokens: of a synthetic
teacher with a vocabulary of 128256, and (not with --quick) of SmolLM2-135M on Wikipedia passages.
Size counts every file of a store. Quality is in `targets/quality.py`.
"""

import argparse
import json
import pathlib
import sys

import rich.console
import rich.table

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "targets"))

import formats
import problem as problems
import quality
import size
import speed

TOKENS = 2048
OURS = "distill_jax"


def show(title: str, columns: tuple[str, ...], rows: list[tuple]) -> None:
    table = rich.table.Table(*columns, title=title)
    for row in rows:
        table.add_row(*(x if isinstance(x, str) else f"{x:,.3g}" for x in row))
    rich.console.Console(stderr=True, width=100).print(table)


def bench(problem: problems.Problem, name: str, options: argparse.Namespace) -> dict:
    peers = [] if options.quick else formats.peers(problem, options.distillkit)
    sizes = size.measure(problem, 1024, peers)
    speeds = speed.measure(problem, 256, 2 if options.quick else 3, peers)
    title = f"{name}: {sizes['mean_ids']:.2f} ids a token, tau {sizes['tau']:.4f}"
    total, an_id = sizes["bytes_per_token"], sizes["bytes_per_id"]
    show(
        title,
        ("part", "bytes/token"),
        [*sizes["parts"].items(), ("all", total), ("all, bytes/id", an_id)],
    )
    every = {OURS: total, **sizes["others"]}
    ours = speeds[OURS]
    show(
        title,
        (
            "format",
            "bytes/token",
            "write k tokens/s",
            "read k tokens/s",
            "ours: size",
            "write",
            "read",
        ),
        [
            (
                form,
                every[form],
                figures["write_tokens_per_s"] / 1e3,
                figures["read_tokens_per_s"] / 1e3,
                total / every[form],
                ours["write_tokens_per_s"] / figures["write_tokens_per_s"],
                ours["read_tokens_per_s"] / figures["read_tokens_per_s"],
            )
            for form, figures in speeds.items()
        ],
    )
    return {"size": sizes, "speed": speeds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="one row of the synthetic teacher, ours alone"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--distillkit", help="a checkout of arcee-ai/DistillKit")
    options = parser.parse_args()
    synthetic = problems.synthetic(1 if options.quick else 4, TOKENS)
    found = {"synthetic": bench(synthetic, "synthetic, V = 128256", options)}
    if not options.quick:
        found["smollm2"] = bench(problems.smollm2(4, TOKENS), "SmolLM2-135M, V = 49152", options)
    errors = quality.measure(quick=options.quick)
    figures = found["synthetic"]
    summary = {
        "bytes_per_id": figures["size"]["bytes_per_id"],
        "bytes_per_token": figures["size"]["bytes_per_token"],
        "mse_threshold_over_random": errors["mse_threshold_over_random"],
        "bias_z_max": errors["bias_z_max"],
        **figures["speed"][OURS],
    }
    if options.json:
        print(json.dumps(summary if options.quick else {**summary, **found, "quality": errors}))


if __name__ == "__main__":
    main()
