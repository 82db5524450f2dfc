"""What SmolLM2 is worth right after a cut, by shape, method and repair: held-out perplexity.

    python scripts/prune_table.py --work DIR [--cuts 15 30 50 70] [--draws 3] [--distill 200000]

Without a step of training, unless `--distill` asks for that many tokens of it: forward KL to the
whole model on passages of train, the same for each cell. Scores, the repair's statistics and each
cell's figure are kept in the work directory: the same command goes on where it stopped, and
`--show` prints what is there. A cell is one (cut, shape, method, repair, draw):

- cut: per cent of the parameters outside the embedding that go.
- shape: what gives them. "neurons" those alone; "width" neurons and heads; "hidden" channels of
  the residual stream and neurons; "depth" layers; "mixed" layers and neurons.
- method: of the parts inside a layer, then of the layers. Minitron's scores are "activation" and
  "influence".
- repair: least squares from the same calibration rows, at once or in sequence. At once, a cut in
  depth alone has nothing to repair.
- draw: of the calibration passages, and the seed of the random method.

`--cuts`, `--shapes` and `--methods` choose cells; `--methods "activation, influence"` names one.
On a GPU (`JAX_PLATFORMS=cuda JAX_DEFAULT_MATMUL_PRECISION=highest`) a cell takes seconds, and
processes `--share 1/N` to `N/N` do all sooner, once `--prepare`, with the same choice of cells, has
left in the work directory what they share.

Calibration is 64 rows of 512 tokens, drawn from the passages of train; Taylor's gradient and the
perplexity without a layer, which cost most, read the first 16 and 4 of them. Perplexity is that of
16 rows of held-out passages, on which nothing is chosen. SmolLM2-135M-Instruct is the
4-bit (Q4_1) model, dequantised.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
import rich.console
import rich.table
from prune_cells import METHODS, REPAIRS, Bench, Cell, cells


def part(text: str) -> tuple[int, int]:
    """K and N of "K/N"."""
    number, count = map(int, text.split("/"))
    if not 1 <= number <= count:
        raise argparse.ArgumentTypeError(f"{text} is not K/N with K from 1 to N")
    return number, count


def share(wanted: list[Cell], number: int, count: int) -> list[Cell]:
    """The cells of one process of several: all of a shape, so that no two compile its programs."""
    shapes = list(dict.fromkeys((cell.shape, cell.cut) for cell in wanted))
    mine = shapes[number - 1 :: count]
    return [cell for cell in wanted if (cell.shape, cell.cut) in mine]


def prepare(bench: Bench, wanted: list[Cell]) -> None:
    """Leaves in the work directory what the cells share."""
    for cell in wanted:
        for missing in bench.preparations(cell):
            missing()


def measure(bench: Bench, wanted: list[Cell]) -> None:
    """Adds a line for each cell that the work directory lacks."""
    file = bench.work / "cells.jsonl"
    done = read(file)
    if None not in done:
        write(file, None, {"perplexity": bench.perplexity(bench.model)})
    missing = [cell for cell in dict.fromkeys(c.measured_as for c in wanted) if cell not in done]
    for number, cell in enumerate(missing, 1):
        prepare(bench, [cell])
        start = time.monotonic()
        model = bench.student(cell)
        if cell.distilled:
            model = bench.distill(model, cell.distilled)
        perplexity = bench.perplexity(model)
        seconds = round(time.monotonic() - start, 1)
        write(file, cell, {"perplexity": perplexity, "seconds": seconds})
        print(f"{number}/{len(missing)} {cell}: {perplexity:.1f} in {seconds} s", file=sys.stderr)


def write(file: pathlib.Path, cell: Cell | None, figures: dict[str, Any]) -> None:
    with file.open("a") as lines:
        described = dataclasses.asdict(cell) if cell else None
        lines.write(json.dumps({"cell": described, **figures}) + "\n")


def read(file: pathlib.Path) -> dict[Cell | None, float]:
    """Perplexity by cell; None is the model before any cut."""
    found: dict[Cell | None, float] = {}
    if file.exists():
        for line in map(json.loads, file.read_text().splitlines()):
            found[Cell(**line["cell"]) if line["cell"] else None] = line["perplexity"]
    return found


def summary(found: dict[Cell | None, float], wanted: list[Cell]) -> list[dict[str, Any]]:
    """A row for each (cut, shape, method): means and spread over the draws that are there."""
    rows: dict[tuple, dict[str, Any]] = {}
    for cell in wanted:
        if cell.measured_as not in found:
            continue
        key = (cell.cut, cell.shape, cell.method)
        row = rows.setdefault(
            key,
            {"cut": key[0], "shape": key[1], "method": key[2]} | {kind: [] for kind in REPAIRS},
        )
        row[cell.repair].append(found[cell.measured_as])
    return sorted(rows.values(), key=lambda row: (row["cut"], row["shape"], row["method"]))


def verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By cut: the best of Minitron's scores without repair, the best of all, and what repair hurt.

    Repair hurts where a draw's perplexity with it is above that without it.
    """
    result: dict[str, Any] = {}
    for cut in sorted({row["cut"] for row in rows}):
        of_cut = [row for row in rows if row["cut"] == cut]
        minitron = [
            float(np.mean(row["none"]))
            for row in of_cut
            if set(row["method"].split(", ")) <= {"activation", "influence"} and row["none"]
        ]
        every = [
            (float(np.mean(row[kind])), f"{row['shape']}: {row['method']}, repair {kind}")
            for row in of_cut
            for kind in REPAIRS
            if row[kind]
        ]
        if not minitron:
            continue
        best, name = min(every)
        hurt = [
            f"{row['shape']}: {row['method']}, {kind}"
            for row in of_cut
            for kind in REPAIRS[1:]
            if any(b > a for a, b in zip(row["none"], row[kind]))
        ]
        result[str(cut)] = {
            "minitron_unrepaired": min(minitron),
            "best": best,
            "best_is": name,
            "ratio": best / min(minitron),
            "hurt_by_repair": hurt,
        }
    return result


def show(found: dict[Cell | None, float], rows: list[dict[str, Any]]) -> None:
    def text(values: list[float]) -> str:
        if not values:
            return ""
        spread = f" ± {np.std(values):.3g}" if len(values) > 1 else ""
        return f"{np.mean(values):.4g}{spread}"

    table = rich.table.Table(title=f"held-out perplexity; {found[None]:.2f} before any cut")
    for name in ("cut %", "shape", "method", "no repair", "at once", "in sequence", "draws"):
        table.add_column(name, justify="left" if name in ("shape", "method") else "right")
    for row in rows:
        draws = max(len(row[kind]) for kind in REPAIRS)
        table.add_row(
            str(row["cut"]),
            row["shape"],
            row["method"],
            *(text(row[kind]) for kind in REPAIRS),
            str(draws),
        )
    rich.console.Console(width=100).print(table)
    for cut, said in verdict(rows).items():
        print(f"{cut}%: {said}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=pathlib.Path, required=True, help="where results are kept")
    parser.add_argument("--cuts", type=int, nargs="+", default=[15, 30, 50, 70])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--methods", nargs="+", help="as the table names them (default: all)")
    parser.add_argument("--distill", type=int, default=0, metavar="TOKENS")
    parser.add_argument("--repairs", nargs="+", choices=REPAIRS, default=list(REPAIRS))
    parser.add_argument("--prepare", action="store_true", help="only what several cells share")
    parser.add_argument(
        "--share", type=part, default=(1, 1), metavar="K/N", help="K-th of N processes"
    )
    parser.add_argument("--show", action="store_true", help="compute nothing")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    wanted = [
        cell
        for cell in cells(options.cuts, options.draws, options.distill)
        if cell.shape in options.shapes
        and (options.methods is None or cell.method in options.methods)
        and cell.repair in options.repairs
    ]
    if not options.show:
        # What a plan decides is data of the same program, so the compiled one is found again.
        jax.config.update("jax_compilation_cache_dir", str(options.work / "compiled"))
        bench = Bench(options.work)
        if options.prepare:
            prepare(bench, wanted)
            return
        measure(bench, share(wanted, *options.share))
    found = read(options.work / "cells.jsonl")
    rows = summary(found, wanted)
    show(found, rows)
    if options.json:
        print(json.dumps({"full": found[None], "rows": rows, "verdict": verdict(rows)}))


if __name__ == "__main__":
    main()
