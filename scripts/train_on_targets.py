"""Does a student learn as much from stored targets as from its teacher?

    python scripts/train_on_targets.py                  # configs/tiny.py as it is, 5 minutes
    python scripts/train_on_targets.py --long           # with a better teacher, 25 minutes
    python scripts/train_on_targets.py --quick --json   # only that it works, under a minute

Teacher, pruning and learning rates are those of configs/tiny.py. After its 40 steps, though, a
teacher knows little but how frequent words are: with --long it has seen 1.3 million tokens, once,
and students take 320 steps of 1,024 of these tokens. Students start from the teacher, pruned; a
seed draws which rows they see, and in what order. They minimise forward KL alone (or --hard-weight
of cross-entropy with the text, and the rest KL) to what they are given of the teacher:

- dense: all logits, of the teacher itself, which runs beside the student;
- threshold: `Threshold` samples, with one tau at which a token has 12 ids on average;
- random_sampling: as many ids on average, drawn with replacement;
- top_k: the 12 likeliest ids, and the mass of the others;
- top_k_alone: the 12 likeliest ids, renormalised, as many trainers do;
- cross_entropy: nothing; it learns the text alone.

tau and draws are set on training rows. Nothing is tuned. Shown are means ± standard errors over
seeds, on held-out rows: cross-entropy with the text, and KL(teacher || student) over the whole
vocabulary, both in nats a token. Differences are paired by seed, and told from noise if their 95%
interval (Student's t) leaves out 0.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "targets"))

import jax
import numpy as np
import rich.console
import rich.table
from calibration import NAMES, scheme_for
from etils import epath
from paired import Difference, difference, mean

from distill_jax import data, evaluation, losses, models, parallel, pipeline, teachers, training
from distill_jax.pipeline import Stage
from distill_jax.recipe import Recipe, Term, load_recipe, to_json
from distill_jax.stages import all_stages, context

CONFIG = pathlib.Path(__file__).resolve().parents[1] / "configs" / "tiny.py"
TEACHER = "large"
IDS = 12
WAYS = ("dense", "threshold", "random_sampling", "top_k", "top_k_alone", "cross_entropy")
"""What a student is given of its teacher."""
FIGURES = ("cross_entropy", "kl")
# Students are short enough to be trained again.
_NO_CHECKPOINTS = {
    f"{train}.checkpoint_every": 1000 for train in ("distill.train", f"teachers.{TEACHER}.train")
}
_SIZES: dict[str, dict[str, Any]] = {
    "quick": {"size": "test", **_NO_CHECKPOINTS},
    "tiny": {"corpus.held_out_rows": 256, **_NO_CHECKPOINTS},
    "long": {
        "corpus.train_rows": 10_240,
        "corpus.held_out_rows": 256,
        f"teachers.{TEACHER}.train.steps": 1280,
        "distill.train.steps": 320,
        **_NO_CHECKPOINTS,
    },
}
_STORES, _ROWS_FOR_TAU = "stores", 32


def recipe(
    seeds: Sequence[int], hard_weight: float, size: str, batch_rows: int | None = None
) -> Recipe:
    """The tiny recipe with one teacher, as it is, longer, or cut short.

    With other rows in a student's step than 8 there are as many more rows to see, each once.
    """
    sizes = [f"{name}={value}" for name, value in _SIZES[size].items()]
    tiny = load_recipe(CONFIG, [*sizes, "corpus.out_of_domain=null"])
    terms = {TEACHER: Term(weight=1 - hard_weight)}
    train = tiny.distill.train
    if batch_rows is not None:
        train = dataclasses.replace(train, batch_rows=batch_rows)
    rows = max(tiny.corpus.train_rows or 0, train.steps * train.batch_rows)
    return dataclasses.replace(
        tiny,
        corpus=dataclasses.replace(tiny.corpus, train_rows=rows),
        teachers={TEACHER: tiny.teachers[TEACHER]},
        distill=dataclasses.replace(
            tiny.distill, terms=terms, hard_weight=hard_weight, train=train
        ),
        controls=(),
        seeds=tuple(seeds),
        posttraining=None,
    )


def compare(run: context.Run, ways: Sequence[str] = WAYS) -> dict[str, Any]:
    """{"stores": figures of the stores, way: {"cross_entropy", "kl"} for each seed}.

    What stands in the run's directory is kept, and what was interrupted goes on.
    """
    figures = pipeline.run(_stages(run, ways), run.directory)
    of_seeds = {way: [figures[f"{way}/seed-{n}"] for n in run.recipe.seeds] for way in ways}
    return {_STORES: figures[_STORES], **of_seeds}


def _stages(run: context.Run, ways: Sequence[str]) -> list[Stage]:
    described = to_json(run.recipe.distill)
    teacher = context.teacher(TEACHER)
    commands = (context.CORPUS, "teachers", context.PRUNE)
    stores = Stage(
        name=_STORES,
        command=_STORES,
        recipe={"ids": IDS, "rows": _ROWS_FOR_TAU},
        inputs=(context.CORPUS, teacher),
        work=functools.partial(_store, run),
    )
    students = [
        Stage(
            name=f"{way}/seed-{seed}",
            command=way,
            recipe=described,
            inputs=(context.CORPUS, teacher, _STORES, context.PRUNE),
            work=functools.partial(_student, run, way, seed),
        )
        for seed in run.recipe.seeds
        for way in ways
    ]
    before = [stage for stage in all_stages(run) if stage.command in commands]
    return [*before, stores, *students]


def _store(run: context.Run, place: epath.Path) -> dict[str, Any]:
    """One store for each scheme, set up on rows of the training split."""
    teacher, corpus = run.load(context.teacher(TEACHER)), run.corpus("train")
    logits_NV = _some_logits(teacher, corpus)
    schemes = {name: scheme_for(name, logits_NV, IDS) for name in NAMES}
    teachers.write_stores(
        {name: place / name for name in schemes},
        schemes,
        teacher,
        corpus,
        config=run.recipe.targets.write,
        sharding=parallel.batch_sharding(run.mesh),
    )
    looks = {name: teachers.describe(place / name, sample=256) for name in schemes}
    # Of the records: the last block of 64 KiB of so small a file would be half of it.
    return {
        name: {
            "scheme": teachers.scheme_to_json(schemes[name]),
            "ids": look["mean_ids"],
            "bytes": sum(look["bytes_per_token"].values()) - look["bytes_per_token"]["on_disk"],
            "teacher_entropy": look["mean_entropy"],
        }
        for name, look in looks.items()
    }


def _some_logits(teacher: models.Model, corpus: data.Corpus) -> jax.Array:
    """Logits [N, V] of the tokens of rows that are spread over the corpus."""
    rows = np.linspace(0, len(corpus) - 1, min(_ROWS_FOR_TAU, len(corpus))).astype(int)
    records = [corpus[row] for row in rows.tolist()]
    tokens_BT, segment_ids_BT = (
        np.stack([record[name] for record in records]) for name in ("tokens", "segment_ids")
    )
    logits_BTV = models.logits(teacher.config, teacher.params, tokens_BT, segment_ids_BT)
    return logits_BTV[segment_ids_BT > 0]


def _student(run: context.Run, way: str, seed: int, place: epath.Path) -> dict[str, Any]:
    """Trains a student from the pruned start, and compares it with its teacher."""
    train = dataclasses.replace(run.recipe.distill.train, seed=seed)
    teacher, start = run.load(context.teacher(TEACHER)), run.load(context.PRUNE)
    rows: data.RowSource = run.corpus("train")
    objective = run.recipe.distill.objective(temperature=1.0)
    teacher_targets, live = None, {}
    if way == "cross_entropy":
        objective = losses.weighted_sum(hard=(1.0, losses.hard_labels()))
    elif way == "dense":
        live = {TEACHER: teacher.config}
    else:
        store = teachers.open_store(run.directory / _STORES / way.removesuffix("_alone"))
        rows = teachers.join(run.corpus("train"), {TEACHER: store})

        def teacher_targets(stored: Mapping[str, Any]) -> dict[str, Any]:
            targets = store.to_targets(stored[TEACHER])
            return {TEACHER: _alone(targets) if way.endswith("_alone") else targets}

    loss_fn = training.language_model_loss(
        start.config,
        objective,
        teacher_targets=teacher_targets,
        live=live,
        mesh=run.mesh,
    )
    run.train(place, start, loss_fn, rows, train, {name: context.teacher(name) for name in live})
    student = models.load(place)
    compared = evaluation.evaluate(
        {TEACHER: teacher, "student": student},
        [TEACHER],
        {"held_out": run.corpus("held_out")},
        dataclasses.replace(run.recipe.evaluation, speed=None),
        mesh=run.mesh,
    )
    held_out = compared["student"]["held_out"]
    return {
        "cross_entropy": held_out["cross_entropy"],
        "kl": held_out["kl"][TEACHER],
        "teacher_cross_entropy": compared[TEACHER]["held_out"]["cross_entropy"],
    }


def _alone(targets: losses.TopKTargets) -> losses.SampledTargets:
    """The ids of a top-k store as if there were no others."""
    return losses.SampledTargets(targets.ids, jax.nn.softmax(targets.log_probs, axis=-1))


PAIRS = (
    *((way, "dense") for way in WAYS[1:]),
    *(("threshold", way) for way in ("random_sampling", "top_k", "top_k_alone")),
)


def differences(compared: Mapping[str, Any]) -> list[Difference]:
    """Every pair in every figure, of what `compare` gives."""
    made = []
    pairs = [pair for pair in PAIRS if compared.keys() >= set(pair)]
    for figure in FIGURES:
        for ours, theirs in pairs:
            a, b = ((way, [seed[figure] for seed in compared[way]]) for way in (ours, theirs))
            made.append(difference(a, b, figure))
    return made


def show(compared: Mapping[str, Any], found: list[Difference]) -> None:
    def table(title: str, *columns: str) -> rich.table.Table:
        made = rich.table.Table(title=title, title_justify="left")
        for column in columns:
            made.add_column(column, justify="right" if made.columns else "left")
        return made

    def text(way: str, figure: str) -> str:
        return mean([seed[figure] for seed in compared[way]], 4)

    console = rich.console.Console(stderr=True, width=100)
    stores, (_, *ways) = compared[_STORES], compared
    knows = compared[ways[0]][0]["teacher_cross_entropy"]
    students = table(
        f"held-out rows, nats a token; the teacher's cross-entropy is {knows:.4f}, its entropy "
        f"{stores['top_k']['teacher_entropy']:.2f}",
        *("student of", "cross-entropy", "KL to the teacher", "ids", "bytes a token"),
    )
    for way in ways:
        stored = stores.get(way.removesuffix("_alone"))
        sizes = [f"{stored[name]:.2f}" for name in ("ids", "bytes")] if stored else []
        students.add_row(way, *(text(way, figure) for figure in FIGURES), *sizes)
    console.print(students)
    pairs = table("differences, with 95% intervals", "figure", "of", "nats a token", "")
    for one in found:
        pairs.add_row(one.figure, f"{one.ours} - {one.theirs}", one.text(4), one.outcome)
    console.print(pairs)


def main() -> None:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch-rows", type=int, help="of a student's step; 8 in the recipe")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="only these")
    parser.add_argument("--hard-weight", type=float, default=0.0, help="of the cross-entropy")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="the recipe's 8 steps of its tests")
    sizes.add_argument("--long", action="store_true", help="a better teacher, longer training")
    parser.add_argument("--out", help="where results are kept; a temporary place if --quick")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    size = "quick" if options.quick else "long" if options.long else "tiny"
    described = recipe(options.seeds, options.hard_weight, size, options.batch_rows)
    with tempfile.TemporaryDirectory() as scratch:
        out = options.out or (
            scratch if options.quick else f"runs/train_on_targets/{size}{options.batch_rows or ''}"
        )
        compared = compare(context.Run(described, epath.Path(out)), options.ways)
    found = differences(compared)
    show(compared, found)
    if options.json:
        pairs = [dataclasses.asdict(one) | {"outcome": one.outcome} for one in found]
        print(json.dumps({**compared, "differences": pairs}))


if __name__ == "__main__":
    main()
