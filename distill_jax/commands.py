"""What the commands do: each takes the options that were typed, and returns its figures."""

import argparse
import json
import os
import shlex
import sys
from typing import Any

import rich.console
from etils import epath

from distill_jax import (
    artifacts,
    data,
    evaluation,
    models,
    parallel,
    pipeline,
    planning,
    posttraining,
    pruning,
    stages,
    teachers,
    training,
)
from distill_jax.artifacts import InputError
from distill_jax.recipe import Recipe, load_recipe
from distill_jax.stages import context, preflight, shapes


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs a recipe, or one kind of its stages, alone or with other processes."""
    parallel.start()
    parallel.keep_compiled()
    with parallel.stoppable(), parallel.together():
        return _run_recipe(options)


def search(options: argparse.Namespace) -> dict[str, Any]:
    """Looks for the shape to prune to, and shows what it found."""
    from distill_jax.evaluation import search_picture  # late: Matplotlib costs most of a second

    parallel.keep_compiled()
    recipe, directory = _recipe_and_directory(options)
    by_parameters = options.parameters is not None
    config = pruning.SearchConfig(
        budgets=tuple(options.parameters if by_parameters else options.decode_bytes),
        cost="parameters" if by_parameters else "decode_bytes",
        tolerance=options.tolerance,
        steps=options.steps,
        context=options.context,
        tied=recipe.prune.target.tied,
        repair_best=options.repair_best,
    )
    found = shapes.search(stages.Run(recipe, directory), config, rows=options.rows)
    if not options.json:
        rich.console.Console().print(evaluation.search_table(found))
    picture = directory / "search" / f"{config.cost}.png"
    search_picture.plot_search(found, config.cost, picture)
    print(f"picture: {picture}", file=sys.stderr)
    front = [candidate.to_json() for candidate in pruning.pareto(found)]
    return {"directory": str(directory), "front": front, "shapes": len(found)}


def compile(options: argparse.Namespace) -> dict[str, Any]:
    """Plans a stage of a recipe on a slice of TPUs."""
    question = planning.Question(
        config=options.config,
        overrides=tuple(options.set),
        stage=options.stage,
        teacher=options.teacher,
        text=options.text,
    )
    return planning.compile_stage(
        question,
        parallel.Topology.parse(options.topology),
        epath.Path(options.out or f"runs/{question.recipe.name}"),
        batches=sorted(set(options.batch)),
        remats=options.remat,
        meshes=list(map(planning.parse_mesh, options.mesh)),
        everything=options.sweep,
        price=options.price,
        quiet=options.json,
    )


def _recipe_and_directory(options: argparse.Namespace) -> tuple[Recipe, epath.Path]:
    recipe = load_recipe(options.config, options.set)
    preflight.check(recipe)
    out = options.out or f"runs/{recipe.name}"
    if "://" in out and getattr(options, "runner", None) is None:
        raise InputError(f"--out {out}: must be a local or mounted directory")
    return recipe, epath.Path(out)


def _run_recipe(options: argparse.Namespace) -> dict[str, Any]:
    recipe, directory = _recipe_and_directory(options)
    typed = ["scripts/run", options.config, *(f"--set={text}" for text in options.set)]
    typed += ["--out", options.out] if options.out else []
    profile = training.parse_steps(options.profile) if options.profile else None
    runner = getattr(options, "runner", None)
    run = stages.Run(recipe, directory, (shlex.join(typed),), profile, runner)
    figures = pipeline.run(
        stages.all_stages(run), directory, command=options.stage, overwrite=options.overwrite
    )
    page = directory / "report" / "index.html"
    if options.stage in (None, "report") and parallel.is_main():
        print(f"report: {page}", file=sys.stderr)
    return {"directory": str(directory), "stages": figures}


def generate(options: argparse.Namespace) -> dict[str, Any]:
    """Lets a model continue a text, or answer a question, as it is written."""
    parallel.keep_compiled()
    model = models.load(options.model)
    tokenizer = data.load_tokenizer(options.model)
    stop_ids = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    if options.chat:
        messages = [{"role": "user", "content": options.prompt}]
        prompt = posttraining.encode_prompt(tokenizer, messages)
        stop_ids.append(posttraining.end_of_turn(tokenizer))
    else:
        prompt = tokenizer.encode(options.prompt, bos=tokenizer.adds_bos)
    piece = tokenizer.stream()

    def show(_: int, tokens: list[int]) -> None:
        text = "".join(piece(token) for token in tokens if token not in stop_ids)
        print(text, end="", flush=True)

    (completion,) = models.generate(
        model,
        [prompt],
        max_new_tokens=options.max_new_tokens,
        sampling=models.Sampling(
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
        ),
        seeds=[options.seed],
        stop_ids=tuple(sorted(set(stop_ids))),
        on_tokens=None if options.json else show,
    )
    if not options.json:
        print()
    text = tokenizer.decode(token for token in completion.tokens if token not in stop_ids)
    return {"text": text, "tokens": len(completion.tokens), "finished": completion.finished}


def average(options: argparse.Namespace) -> dict[str, Any]:
    """Leaves the mean of several models, with the tokenizer and chat template that they share."""
    out = epath.Path(options.out)
    if models.is_saved(out):
        raise InputError(f"--out {out}: holds a model")
    tokenizers = {name: data.load_tokenizer(name) for name in options.model}
    chats = [name for name, one in tokenizers.items() if one.chat_template is not None]
    shared = (chats or options.model)[0]
    tokenizer = tokenizers[shared]
    for other, one in tokenizers.items():
        if one.fingerprint != tokenizer.fingerprint:
            raise InputError(f"{other}: another tokenizer than {shared}")
        if one.chat_template not in (None, tokenizer.chat_template):
            raise InputError(f"{other}: another chat template than {shared}")
    model = models.average(options.model, weights=options.weights)
    tokenizer.save(out)
    models.save(out, model)
    return {"directory": str(out), "models": len(options.model)}


def inspect(options: argparse.Namespace) -> dict[str, Any]:
    """Shows what a plan, a store, a stage or a model holds."""
    place = artifacts.resolve(options.artifact)
    if place.name.endswith(".json"):
        plan = pruning.Plan.load(place)
        if not options.json:
            console = rich.console.Console()
            console.print(pruning.draw(plan, width=min(console.width, 120)))
        return plan.to_json()
    if (place / "store.json").exists():
        found = _describe_store(place, options)
        if not options.json:
            teachers.show(found)
        return found
    found = _describe(place)
    if not options.json:
        print(json.dumps(found, indent=2))
    return found


def _describe_store(place: epath.Path, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of a store, and a row if there is a corpus to read its text from."""
    found = dict(teachers.describe(place))
    # A run's stores lie in targets/TEACHER/NAME.
    beside = place.resolve().parent.parent.parent / context.CORPUS
    directory = options.corpus or (beside if (beside / "corpus.json").exists() else None)
    if directory is not None:
        tokenizer = data.load_tokenizer(directory)
        corpus = data.open_corpus(directory, options.split, tokenizer=tokenizer)
        found["row"] = teachers.describe_row(
            place, corpus, tokenizer, options.row, tokens=options.tokens
        )
    return found


def _describe(place: epath.Path) -> dict[str, Any]:
    if (place / pipeline.MANIFEST).exists():
        return pipeline.read_manifest(place)
    config = models.load_config(os.fspath(place))
    sizes = ("parameters", "non_embedding_parameters")
    return {name: getattr(config, name) for name in sizes} | {"shape": config.to_json()}


def verify(options: argparse.Namespace) -> dict[str, Any]:
    """Re-hashes a store, and compares rows with the corpus and the teacher."""
    if options.teacher and not options.corpus:
        raise InputError("verify: --teacher needs --corpus")
    parallel.keep_compiled()
    corpus = data.open_corpus(options.corpus, options.split) if options.corpus else None
    model = models.load(options.teacher) if options.teacher else None
    found = dict(teachers.verify(options.store, corpus=corpus, model=model, sample=options.sample))
    if not options.json:
        print(json.dumps(found, indent=2))
    return found
