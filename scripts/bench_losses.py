"""Time and memory of the losses beside their peers, on this machine's CPU.

    scripts/peers/setup                                  # once: the peers' own environment
    python scripts/bench_losses.py                       # everything, about half an hour
    python scripts/bench_losses.py --only 'liger*' trl-* # some contenders
    python scripts/bench_losses.py --only 'scaling-K'    # one of the scaling tables (V, N, K)
    python scripts/bench_losses.py --quick --json        # ours alone, under 50 s, one line of JSON

What is measured: cross-entropy plus forward KL, forward and backward (gradients of hidden states
[N, D] and unembedding [D, V]), float32. A dense teacher is an array of logits [N, V] (or, for peers
that insist on a teacher's hidden states and unembedding, those, at one product more), a sparse one
64 ids per token with their probabilities. Every contender first has to give the loss and the
gradients of a float64 NumPy computation to 1e-4 on a small problem.

Time is a multiple of the floor: the matrix products that the objective cannot do without, at the
rate that XLA reaches, here and now, on the same products over 16384 columns of the vocabulary.
The floor is measured before and after every single run; a run's floor is the mean of both. "over
floor" is the fastest run by the lowest floor, and the median of each run by its own floor stands
beside it. Memory is the peak of the resident set during a run over what it was just before, with
the inputs there; the gradients themselves (N D + D V numbers) are part of it. Every contender has
its own process, and all have transparent huge pages, which spare XLA and PyTorch alike a sixth of
their time (GLIBC_TUNABLES overrides).
"""

import argparse
import contextlib
import dataclasses
import fnmatch
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable

import rich.console
import rich.table

from distill_jax import progress

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "peers"))

from contenders import CONTENDERS, Contender  # noqa: E402
from problem import Shape  # noqa: E402

FULL = Shape(tokens=2048, embed=512, vocab=128256, ids=64)
QUICK_TOKENS = 1024
OURS = ("ours-dense", "ours-sparse", "ours-labels")
ORACLE_CASES = 10_000
BUSY = 1.15
"""Floors whose median is this much above their least say that others used the cores."""


@dataclasses.dataclass
class Row:
    """What was measured of one contender at one shape; times in seconds, growth in bytes."""

    contender: Contender
    shape: Shape
    seconds: list[float] = dataclasses.field(default_factory=list)
    floors: list[float] = dataclasses.field(default_factory=list)
    growth: list[int] = dataclasses.field(default_factory=list)
    error: float | None = None
    failure: str = ""

    def best(self) -> float:
        return min(self.seconds) / min(self.floors)

    def figures(self) -> dict:
        about = {"name": self.contender.name, **dataclasses.asdict(self.shape)}
        if self.failure:
            return {**about, "failure": self.failure}
        return {
            **about,
            "products": self.contender.products,
            "seconds_min": min(self.seconds),
            "seconds_median": statistics.median(self.seconds),
            "floor_min": min(self.floors),
            "floor_median": statistics.median(self.floors),
            "over_floor": self.best(),
            "over_floor_median": statistics.median(
                run / floor for run, floor in zip(self.seconds, self.floors)
            ),
            "extra_mb": max(self.growth) / 1e6,
            "error": self.error,
        }


class Worker:
    """A process that runs one contender, or the floor, whenever it is asked to."""

    def __init__(self, name: str, shape: Shape, python: str, site: str | None):
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [python, "worker.py"],
            cwd=HERE / "peers",
            env={"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "JAX_PLATFORMS": "cpu", **os.environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        job = {"name": name, "shape": dataclasses.asdict(shape), "site": site}
        self._send(json.dumps(job))

    def _send(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._requests.write(line + "\n")
            self._requests.flush()

    def answer(self) -> dict:
        """Waits for the next answer. Raises RuntimeError with the process's last words."""
        line = self._answers.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._errors.seek(0)
        words = self._errors.read().strip().splitlines() or [f"exit {self._process.returncode}"]
        raise RuntimeError(words[-1])

    def run(self) -> dict:
        self._send("")
        return self.answer()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()
        self._process.wait()


def measure(rows: list[Row], rounds: int, warm_ups: int, bar: progress.Bar) -> None:
    """Fills rows of one shape: each in its own process, taking turns with the floor.

    One contender after the other, and no pause between its runs: a virtual machine may give memory
    that lies free for a second or two back to its host, and getting it again takes longer than
    computing on it.
    """
    shape = rows[0].shape
    floor = Worker("floor", shape, sys.executable, None)
    workers = [(row, _start(row)) for row in rows]
    try:
        floor.answer()
        for row, worker in workers:
            with _failing(row):
                row.error = worker.answer()["error"]
        for row, worker in workers:
            after = None
            for turn in range(warm_ups + rounds):
                with _failing(row):
                    if not row.failure and turn < warm_ups:
                        worker.run()
                    elif not row.failure:
                        before = after or _settled(floor)
                        run, after = _settled(worker), _settled(floor)
                        _note(row, run, before, after)
                bar.advance(note=row.contender.name)
    finally:
        for _, worker in workers:
            worker.close()
        floor.close()


def _start(row: Row) -> Worker:
    python, site = sys.executable, None
    if row.contender.framework == "torch" or row.contender.site:
        peers = _peers_python()
        site = str(next((peers.parent.parent / "lib").glob("python3*/site-packages")))
        python = str(peers) if row.contender.framework == "torch" else python
    return Worker(row.contender.name, row.shape, python, site)


def _peers_python() -> pathlib.Path:
    return HERE.parent / os.environ.get("PEERS_VENV", ".venv-peers") / "bin" / "python"


@contextlib.contextmanager
def _failing(row: Row):
    try:
        yield
    except RuntimeError as error:
        row.failure = str(error)


def _settled(worker: Worker) -> dict:
    """Runs once the threads of the process before have stopped spinning."""
    time.sleep(0.05)
    return worker.run()


def _note(row: Row, run: dict, before: dict, after: dict) -> None:
    products = [(a + b) / 2 for a, b in zip(before["seconds"], after["seconds"])]
    row.seconds.append(run["seconds"])
    row.growth.append(run["growth"])
    # A fourth product is a teacher's logits, of the shape of the first.
    row.floors.append(sum(products) + (row.contender.products - 3) * products[0])


def plan(args: argparse.Namespace) -> dict[str, list[list[Row]]]:
    """Tables of groups of rows; the rows of a group share a shape and take turns."""
    by_name = {one.name: one for one in CONTENDERS}
    shape = dataclasses.replace(FULL, tokens=args.tokens)
    peers = [] if args.quick else [[one.name] for one in CONTENDERS if one.name not in OURS]
    groups = [list(OURS), *peers]
    chosen = [[name for name in group if _chosen(name, args.only)] for group in groups]
    tables = {"contenders": [[Row(by_name[name], shape) for name in group] for group in chosen]}
    if args.quick:
        return tables
    # Smaller than the contenders' table, for it is read along a column.
    base = dataclasses.replace(FULL, tokens=QUICK_TOKENS)
    scalings = (
        ("V", "vocab", (32064, 64128, 128256, 256512)),
        ("N", "tokens", (512, 1024, 2048, 4096)),
        ("K", "ids", (1, 4, 16, 64, 256)),
    )
    for letter, field, values in scalings:
        if _chosen(f"scaling-{letter}", args.only):
            shapes = [dataclasses.replace(base, **{field: value}) for value in values]
            names = OURS[1:] if letter == "K" else OURS
            tables[f"scaling-{letter}"] = [
                [Row(by_name[name], shape) for name in names] for shape in shapes
            ]
    return tables


def _sizes(shape: Shape) -> str:
    return ", ".join(str(size) for size in dataclasses.astuple(shape))


def _chosen(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _flat(groups: Iterable[list]) -> list:
    return list(itertools.chain.from_iterable(groups))


def show(title: str, rows: list[Row], console: rich.console.Console) -> None:
    shapes = {row.shape for row in rows}
    if len(shapes) == 1:
        title += " at N, D, V, K = " + _sizes(rows[0].shape)
    table = rich.table.Table(title=title, title_justify="left")
    table.add_column("contender", no_wrap=True)
    if len(shapes) > 1:
        table.add_column("N, D, V, K")
    for name in ("s min", "s median", "floor s", "over floor", "(median)", "extra MB", "off by"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in rows:
        cells = [row.contender.name]
        if len(shapes) > 1:
            cells.append(_sizes(row.shape))
        if row.failure:
            table.add_row(*cells, *["-"] * 7, row.failure)
            continue
        figures = row.figures()
        names = ("seconds_min", "seconds_median", "floor_median", "over_floor", "over_floor_median")
        cells += [f"{figures[name]:.2f}" for name in names]
        extra = "" if row.contender.products == 3 else f"{row.contender.products} products; "
        cells += [f"{figures['extra_mb']:,.0f}", f"{row.error:.0e}", extra + row.contender.note]
        table.add_row(*cells)
    console.print(table)


def headline(rows: list[Row]) -> dict:
    """The figures to hold ours against; null where something was not measured."""
    found = {row.contender.name: row for row in rows if not row.failure}
    dense, sparse, labels = (found.get(name) for name in OURS)
    both = sparse and labels and min(sparse.seconds) / min(labels.seconds)
    extra = [max(row.growth) / 1e6 for row in (dense, sparse) if row]
    cases, worst = oracle()
    return {
        "dense_over_floor": dense and round(dense.best(), 4),
        "sparse_over_floor": sparse and round(sparse.best(), 4),
        "sparse_over_fused_ce": both and round(both, 4),
        "fused_extra_mb": round(max(extra), 1) if extra else None,
        "oracle_cases": cases,
        "oracle_worst": worst,
    }


def oracle() -> tuple[int | None, float | None]:
    """How many cases the divergences were held against float64 NumPy in, and the worst error."""
    try:
        import oracle_losses
    except ModuleNotFoundError:
        return None, None
    return oracle_losses.run(ORACLE_CASES, 0)


def main() -> None:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="ours alone, at fewer tokens")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="PATTERN", help="contenders or scaling-X"
    )
    parser.add_argument("--tokens", type=int, help=f"N (default {FULL.tokens})")
    parser.add_argument("--rounds", type=int, help="runs of each contender (default 5, quick 2)")
    args = parser.parse_args()
    args.tokens = args.tokens or (QUICK_TOKENS if args.quick else FULL.tokens)
    rounds = args.rounds or (2 if args.quick else 5)
    # Some peers compile in their first run, and memory is slow to get for the first time.
    warm_ups = 1

    tables = plan(args)
    if not any(_flat(tables.values())):
        parser.error(f"--only {' '.join(args.only)} matches no contender and no scaling table")
    if not args.quick and not _peers_python().exists():
        print("no peers' environment: run scripts/peers/setup; ours and JAX only", file=sys.stderr)
        for row in _flat(_flat(tables.values())):
            if row.contender.framework == "torch" or row.contender.site:
                row.failure = "not installed: scripts/peers/setup"
    groups = [[row for row in group if not row.failure] for group in _flat(tables.values())]
    total = sum(len(group) for group in groups) * (warm_ups + rounds)
    with progress.bar("bench losses", total, unit="runs") as bar:
        for group in filter(None, groups):
            measure(group, rounds, warm_ups, bar)

    console = rich.console.Console(width=None if sys.stdout.isatty() else 150)
    for title, table_groups in tables.items():
        rows = _flat(table_groups)
        if rows:
            show(title, rows, console)
    contenders = _flat(tables["contenders"])
    measured = [row for row in contenders if row.floors]
    floors = _flat(row.floors for row in measured if row.contender.products == 3)
    if floors:
        flops = 6 * measured[0].shape.tokens * FULL.embed * FULL.vocab
        spread = statistics.median(floors) / min(floors)
        rates = [flops / seconds / 1e9 for seconds in (statistics.median(floors), min(floors))]
        print("XLA's matrix products: {:.0f} GFLOP/s, at best {:.0f}".format(*rates))
        if spread > BUSY:
            print("this machine was busy: do not trust the times", file=sys.stderr)
    if args.json:
        result = headline(contenders)
        if not args.quick:
            result["rows"] = [row.figures() for row in _flat(_flat(tables.values()))]
        print(json.dumps(result))


if __name__ == "__main__":
    main()
