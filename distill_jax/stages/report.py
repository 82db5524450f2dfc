"""report: the page that shows a whole run, filled from what the stages left."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from distill_jax import evaluation, parallel, pipeline, pruning, teachers
from distill_jax.pipeline import Stage
from distill_jax.recipe import Recipe
from distill_jax.stages import context
from distill_jax.stages.context import (
    CORPUS,
    DPO,
    EVALUATE,
    EXPORT,
    ON_POLICY,
    PRUNE,
    REJECTION,
    REPORT,
    REWARD,
    SFT,
    Run,
)

_STUDENT, _PRUNED = "distilled", "pruned"
_CONTROL_NAMES = {
    "cross_entropy": ("cross-entropy only", "the same pruned start, without teachers"),
    "random_start": ("random start", "the same targets, from random parameters"),
}
_POSTTRAINING = {
    SFT: ("+ SFT", "answers learnt from demonstrations"),
    ON_POLICY: ("+ on-policy distillation", "its own answers, corrected by a teacher"),
    REWARD: ("+ reward model", "judges answers, gives none"),
    REJECTION: ("+ rejection sampling", "its own best answers, picked by a verifier"),
    DPO: ("+ DPO", "right answers preferred to wrong ones"),
}


def _of_both(figure: str) -> tuple[tuple[str, str], ...]:
    """A panel's lines: a figure of the answers chosen, and of those rejected."""
    return (f"chosen_{figure}", "chosen"), (f"rejected_{figure}", "rejected")


_LOSS = ("loss", "nats per token", (("loss", "loss"),))
_TOLD_APART = "pairs in which chosen is ahead", "share of pairs"
_OF_PAIRS = ("dpo", "DPO"), ("robust_dpo", "robust DPO"), ("ipo", "IPO")
_TO_TEACHER = (("reverse_kl", "GKD"), ("minillm/single_step", "MiniLLM"))
_LEARNT = {
    SFT: (_LOSS,),
    # The value of MiniLLM's loss means nothing.
    ON_POLICY: (("KL to the teacher", "nats per token", _TO_TEACHER),),
    REWARD: (
        ("scores", "reward", _of_both("score")),
        (*_TOLD_APART, (("score_accuracy", "accuracy"),)),
    ),
    REJECTION: (_LOSS,),
    DPO: (
        ("loss", "per pair", _OF_PAIRS),
        ("log-probabilities", "nats per answer", _of_both("log_prob")),
        ("rewards", "beta × nats", (*_of_both("reward"), ("reward_margin", "margin"))),
        (*_TOLD_APART, (("reward_accuracy", "accuracy"),)),
    ),
}
"""Of each stage of post-training: what a panel shows, its unit, and its lines."""


def stages(run: Run) -> list[Stage]:
    """The last stage, which reads all others."""
    recipe = run.recipe
    inputs = [
        *context.round_stages(recipe),
        PRUNE,
        *map(context.targets, context.stored_teachers(recipe)),
        *map(context.student, recipe.seeds),
        *(context.control(kind, seed) for kind in recipe.controls for seed in recipe.seeds),
        *context.posttraining_stages(recipe),
        EVALUATE,
        EXPORT,
    ]
    return [
        Stage(
            name=REPORT,
            command=REPORT,
            recipe={
                "title": recipe.name,
                "teachers": list(recipe.teachers),
                "notes": list(recipe.notes),
            },
            inputs=inputs,
            work=lambda place: parallel.on_main(lambda: _work(run, place), what=REPORT),
        )
    ]


def _work(run: Run, place: epath.Path) -> dict[str, Any]:
    recipe = run.recipe
    evaluated = pipeline.read_manifest(run.directory / EVALUATE)["figures"]
    names = _row_names(recipe)
    report = evaluation.Report(
        title=recipe.name,
        teacher=names[context.teacher(next(iter(recipe.teachers)))],
        pruned=_PRUNED,
        student=_STUDENT,
        rows=_rows(recipe, evaluated["models"]),
        splits=("held_out", "out_of_domain") if recipe.corpus.out_of_domain else ("held_out",),
        cut=_cut(run),
        curves=_curves(run),
        curve_metrics=_curve_metrics(recipe),
        posttraining=_posttraining(run),
        prompts=[_prompt(prompt, names) for prompt in evaluated["prompts"]],
        targets=_stored_targets(run),
        stages=_finished(run),
        commands=run.commands,
        versions=pipeline.versions(),
        notes=recipe.notes,
    )
    evaluation.write_report(place, report)
    return {"page": "index.html"}


def _row_names(recipe: Recipe) -> dict[str, str]:
    """What the page calls the model of a stage."""
    names = {PRUNE: _PRUNED, context.student(recipe.seeds[0]): _STUDENT}
    return names | {context.teacher(name): name for name in recipe.teachers}


def _rows(recipe: Recipe, figures: Mapping[str, Any]) -> list[evaluation.Row]:
    def one(stage: str) -> dict[str, Any]:
        found = dict(figures[stage])
        for split in ("held_out", "out_of_domain"):
            if split in found:
                renamed = {
                    key: {_teacher_name(stage): value for stage, value in found[split][key].items()}
                    for key in ("kl", "agreement")
                }
                found[split] = {**found[split], **renamed}
        return found

    rows = []
    for name, teacher in recipe.teachers.items():
        note = f"{teacher.teacher} after fine-tuning on the corpus" if teacher.teacher else ""
        rows.append(
            evaluation.Row(
                name=name,
                kind="teacher",
                runs=[one(context.teacher(name))],
                note=note,
            )
        )
    rows.append(
        evaluation.Row(name=_PRUNED, kind="pruned", runs=[one(PRUNE)], note="before training")
    )
    for kind in recipe.controls:
        name, note = _CONTROL_NAMES[kind]
        runs = [one(context.control(kind, seed)) for seed in recipe.seeds]
        rows.append(evaluation.Row(name=name, kind="control", runs=runs, note=note))
    runs = [one(context.student(seed)) for seed in recipe.seeds]
    rows.append(evaluation.Row(name=_STUDENT, kind="distilled", runs=runs))
    for stage, (name, note) in _posttrained(recipe).items():
        if context.kind(stage) != REWARD:
            runs = [one(stage)]
            rows.append(evaluation.Row(name=name, kind="post-trained", runs=runs, note=note))
    return rows


def _posttrained(recipe: Recipe) -> dict[str, tuple[str, str]]:
    """The trainings of post-training: the stage, what the page calls it, and a note."""
    found = {}
    for stage in context.posttraining_stages(recipe):
        kind = context.kind(stage)
        name, note = _POSTTRAINING[kind]
        if rounds := len(recipe.posttraining_rounds):
            number = rounds if stage == kind else int(stage.split("/")[1])
            name += f", round {number + 1}"
        found[stage] = name, note
    return found


def _teacher_name(stage: str) -> str:
    return stage.removeprefix("teachers/")


def _cut(run: Run) -> evaluation.Cut:
    plan = pruning.Plan.load(run.directory / PRUNE / pruning.PLAN_FILE)
    scores = pruning.Scores.load(run.directory / PRUNE / pruning.SCORES_FILE)
    sizes = [
        (label, getattr(plan.source, field), getattr(plan.target, field))
        for label, field in (
            ("layers", "layers"),
            ("hidden channels", "embed"),
            ("query heads", "heads"),
            ("KV groups", "kv_heads"),
            ("MLP neurons", "mlp"),
            ("head dimension", "head_dim"),
        )
    ]
    sizes.append(("parameters", plan.source.parameters, plan.target.parameters))
    return evaluation.Cut(
        sizes=sizes,
        block_influence=np.asarray(scores.layers).tolist(),
        heads=np.asarray(scores.heads).tolist(),
        neurons=np.asarray(scores.mlp).tolist(),
        channels=np.asarray(scores.embed).tolist(),
        kept_layers=plan.layers.tolist(),
        kept_heads=plan.heads.tolist(),
        kept_neurons=plan.mlp.tolist(),
        kept_channels=plan.embed.tolist(),
    )


def _curves(run: Run) -> list[evaluation.Curve]:
    recipe = run.recipe
    stages = {_STUDENT: [context.student(seed) for seed in recipe.seeds]}
    for kind in recipe.controls:
        stages[_CONTROL_NAMES[kind][0]] = [context.control(kind, s) for s in recipe.seeds]
    return [
        evaluation.read_curve(name, [run.directory / stage / "metrics.jsonl" for stage in of_seeds])
        for name, of_seeds in stages.items()
    ]


def _curve_metrics(recipe: Recipe) -> list[tuple[str, str]]:
    metrics = [("hard", "Cross-entropy on the training text")]
    for name, term in recipe.distill.terms.items():
        divergence = term.divergence.replace("_", " ").replace("kl", "KL")
        source = "which reads along" if term.live else "from stored targets"
        metrics.append((name, f"{divergence} to teacher {name}, {source}"))
    return metrics


def _posttraining(run: Run) -> list[evaluation.Panel]:
    """Panels of each of its trainings, of all runs where a stage leaves their mean."""
    panels = []
    for stage, (name, _) in _posttrained(run.recipe).items():
        place = run.directory / stage
        runs = sorted(place.glob("run-*/metrics.jsonl")) or [place / "metrics.jsonl"]
        curve = evaluation.read_curve(name, runs)
        for title, unit, metrics in _LEARNT[context.kind(stage)]:
            panels.append(
                evaluation.Panel(
                    title=f"{name.removeprefix('+ ')}: {title}",
                    unit=unit,
                    curve=curve,
                    metrics=metrics,
                )
            )
    return panels


def _prompt(prompt: Mapping[str, Any], names: Mapping[str, str]) -> evaluation.Prompt:
    answers = [
        evaluation.Answer(
            model=names[answer["stage"]],
            next_tokens=[evaluation.NextToken(*one) for one in answer["next_tokens"]],
            completion=answer["completion"],
        )
        for answer in prompt["answers"]
    ]
    return evaluation.Prompt(text=prompt["text"], answers=answers)


def _stored_targets(run: Run) -> list[evaluation.StoredTargets]:
    found = []
    for name in context.stored_teachers(run.recipe):
        place = run.directory / context.targets(name)
        for store in pipeline.read_manifest(place)["figures"]:
            look = teachers.describe(place / store)
            found.append(
                evaluation.StoredTargets(
                    teacher=name,
                    scheme=store.replace("_", " "),
                    tokens=look["tokens"],
                    bytes=look["bytes"],
                    vocab_size=run.tokenizer.vocab_size,
                    ids=look["mean_ids"],
                    entropy=look["mean_entropy"],
                    cross_entropy=look["teacher_cross_entropy"],
                )
            )
    return found


def _finished(run: Run) -> list[evaluation.FinishedStage]:
    recipe = run.recipe
    names = [
        CORPUS,
        *map(context.targets, context.stored_teachers(recipe)),
        *context.round_stages(recipe),
        *dict.fromkeys([*context.model_stages(recipe), *context.posttraining_stages(recipe)]),
        EVALUATE,
        EXPORT,
    ]
    manifests = [pipeline.read_manifest(run.directory / name) for name in names]
    manifests.sort(key=lambda manifest: manifest["finished"])
    return [
        evaluation.FinishedStage(
            name=manifest["stage"],
            summary=_summary(manifest["figures"]),
            seconds=manifest["seconds"],
        )
        for manifest in manifests
    ]


def _summary(figures: Mapping[str, Any]) -> str:
    """What came of a stage, in a few words."""
    if "loss" in figures:
        drawn = skipped = ""
        if "solved" in figures:
            best = f"the best for {figures['solved']:,} of {figures['problems']:,} prompts"
            drawn = f"{figures['samples']:,} answers, {best}; "
        if figures.get("skipped"):
            skipped = f", {figures['skipped']:,} records skipped"
        return (
            f"{drawn}{figures['tokens']:,} tokens, loss {figures['loss']:.2f} at the end{skipped}"
        )
    if "parameters" in figures:
        return f"{figures['parameters']:,} parameters"
    if "splits" in figures:
        return f"{figures['splits']['train']['tokens']:,} training tokens"
    return ""
