"""The commands."""

import argparse
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, get_args

import rich.console
from etils import epath

from distill_jax import (
    __version__,
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

_DESCRIPTION = """\
Turns a large Llama into a small one:
corpus -> teachers -> targets -> prune -> distill -> sft -> on-policy -> reward-model
-> rejection-sample -> dpo -> evaluate -> export -> report."""

_EXAMPLES = """\
examples:
  distill-jax run configs/smollm2_135m.py
      every stage of the recipe; what is done already is skipped, what was interrupted goes on
  distill-jax run configs/smollm2_135m.py --set size=full --set distill.train.steps=400
      a parameter of the config file's get_config, and any field of its recipe by dotted name
  distill-jax prune configs/tiny.py --out runs/mine
      one stage alone; the stages that it reads must have been run there
  distill-jax search configs/tiny.py --out runs/mine --parameters 4e5 5e5
      which shape of that size predicts best right after the cut; needs corpus and teachers
  distill-jax compile configs/llama3_2_1b.py --topology v5e:16x16 --batch 1 2 4
      what the distillation would take on a slice of TPUs, which need not be there
  distill-jax generate runs/mine/distill/seed-0 --prompt "The capital of France is"
  distill-jax inspect runs/mine/targets/large/samples --row 3
  distill-jax verify runs/mine/targets/large/samples --corpus runs/mine/corpus

exit status:
  0 done; 1 the work failed; 2 a wrong input; 130 interrupted; 75 told to stop by SIGTERM, or
  another process was lost: the same command goes on, with any number of devices and processes"""

_STAGE_HELP = {
    "corpus": "tokenize and pack the texts",
    "teachers": "import, pre-train or correct the teachers",
    "targets": "store the teachers' distributions over the training tokens",
    "rounds": "cut and train on the way to the student's size, where the recipe says so",
    "prune": "importance -> plan -> surgery -> repair",
    "distill": "train the students, and the controls, on what the teachers say",
    "sft": "fine-tune on demonstrations, or conversations of your own",
    "on-policy": "let a teacher correct what the student writes, where the recipe says so",
    "reward-model": "train a judge of answers on preference pairs, where the recipe says so",
    "rejection-sample": "sample answers, let a reward pick, fine-tune on the best",
    "dpo": "prefer right answers to wrong ones",
    "evaluate": "measure every model",
    "export": "write the last model as a Hugging Face folder",
    "report": "write report/index.html",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status.

    0: done; 1: the work failed; 2: a wrong input, told in one line; 75: the same command goes on,
    since the machine is taken away or another process was lost; 130: interrupted.
    """
    options = _parser().parse_args(arguments)
    # Orbax tells of every file it writes; a person who runs a recipe has no use for that.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        figures = options.work(options)
    except (InputError, FloatingPointError, OSError, parallel.ProcessError) as error:
        print(f"{_name()}: error: {error}", file=sys.stderr)
        status = 2 if isinstance(error, InputError) else 1
        return parallel.EXIT_AGAIN if isinstance(error, parallel.ProcessLost) else status
    except parallel.Preempted as told:
        if parallel.is_main():
            print(f"distill-jax: {told}; the same command goes on from here", file=sys.stderr)
        return parallel.EXIT_AGAIN
    except KeyboardInterrupt:
        print("distill-jax: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    if options.json and parallel.is_main():
        print(json.dumps(figures, sort_keys=True))
    return 0


def _name() -> str:
    """Of the program, and of this process if there are several."""
    return f"distill-jax process {parallel.index()}" if parallel.count() > 1 else "distill-jax"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distill-jax",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"distill-jax {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, summary: str, work: Callable[[Any], Any]) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(work=work)
        command.add_argument(
            "--json", action="store_true", help="end with one line of JSON on standard output"
        )
        return command

    _add_recipe_options(add("run", "run all stages of a recipe", _run), None)
    for name in stages.COMMANDS:
        _add_recipe_options(add(name, _STAGE_HELP[name], _run), name)
    _add_search_options(add("search", "find the shape to prune to, at a given cost", _search))
    _add_compile_options(add("compile", "plan a stage on a TPU slice, without one", _compile))
    generate = add("generate", "let a model continue a text or answer a question", _generate)
    generate.add_argument("model", help="a checkpoint directory, GGUF file or Hugging Face folder")
    generate.add_argument("--prompt", required=True, help="the text")
    generate.add_argument(
        "--chat", action="store_true", help="the prompt is a question: use the chat template"
    )
    generate.add_argument("--max-new-tokens", type=int, default=64)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    generate.add_argument("--top-k", type=int, help="draw from so many tokens only")
    generate.add_argument("--top-p", type=float, help="and from this share of the probability")
    generate.add_argument("--min-p", type=float, help="and of this part of the likeliest's")
    generate.add_argument("--seed", type=int, default=0)
    inspect = add("inspect", "show what a file or directory of a run holds", _inspect)
    inspect.add_argument("artifact", help="a store, a stage's directory, a model, or a plan")
    inspect.add_argument(
        "--corpus", help="of a store: shows a row of it (default: that of the store's own run)"
    )
    inspect.add_argument("--split", default="train")
    inspect.add_argument("--row", type=int, default=0, help="which row of the corpus")
    inspect.add_argument("--tokens", type=int, default=32, help="how many of its tokens")
    verify = add("verify", "re-hash a store of targets, and recompute some of its rows", _verify)
    verify.add_argument("store")
    verify.add_argument("--corpus", help="a corpus directory, to compare rows with")
    verify.add_argument("--split", default="train")
    verify.add_argument("--teacher", help="the teacher, to recompute rows; needs --corpus")
    verify.add_argument("--sample", type=int, default=8, help="how many rows to recompute")
    return parser


def _add_recipe_options(command: argparse.ArgumentParser, stage: str | None) -> None:
    command.set_defaults(stage=stage)
    _add_recipe(command)
    command.add_argument(
        "--overwrite", action="store_true", help="replace results of another recipe"
    )
    command.add_argument(
        "--profile",
        metavar="FIRST:LAST",
        help="trace these steps of every training, for XProf, into its stage's directory",
    )


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", help="a Python file with get_config() -> Recipe")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="override a field of the recipe by dotted name, or a parameter of get_config",
    )
    command.add_argument("--out", help="the run's directory (default: runs/NAME)")


def _add_search_options(command: argparse.ArgumentParser) -> None:
    _add_recipe(command)
    budget = command.add_mutually_exclusive_group(required=True)
    budget.add_argument(
        "--parameters", type=float, nargs="+", metavar="N", help="how many, of all together"
    )
    budget.add_argument(
        "--decode-bytes",
        type=float,
        nargs="+",
        metavar="N",
        help="what one decoded token reads from memory in bfloat16: weights, keys and values",
    )
    defaults = pruning.SearchConfig(budgets=(1.0,))
    command.add_argument(
        "--context", type=int, default=defaults.context, help="tokens of keys and values"
    )
    command.add_argument(
        "--tolerance", type=float, default=defaults.tolerance, help="of a budget, as a fraction"
    )
    command.add_argument(
        "--steps", type=int, default=defaults.steps, help="sizes of each axis that are tried"
    )
    command.add_argument(
        "--rows", type=int, default=16, help="calibration rows on which shapes are ranked"
    )
    command.add_argument(
        "--repair-best", type=int, default=0, metavar="N", help="measure so many repaired, too"
    )


def _add_compile_options(command: argparse.ArgumentParser) -> None:
    _add_recipe(command)
    command.add_argument("--topology", required=True, metavar="CHIP:AxB", help="such as v5e:16x16")
    command.add_argument("--stage", default="distill", choices=get_args(planning.Stage))
    command.add_argument("--teacher", help="whose targets are written (default: the largest)")
    command.add_argument(
        "--batch", type=int, nargs="+", default=(), metavar="ROWS", help="at a time, on each device"
    )
    command.add_argument("--remat", nargs="+", default=(), choices=get_args(models.llama.Remat))
    command.add_argument(
        "--mesh", nargs="+", default=(), metavar="data=N,tensor=N", help="devices along each axis"
    )
    command.add_argument(
        "--sweep", action="store_true", help="try what is usual of whatever is not given"
    )
    command.add_argument("--price", type=float, metavar="USD", help="of a chip and hour")
    command.add_argument("--text", metavar="DIRECTORY", help="leave the compiled programs there")


def _run(options: argparse.Namespace) -> dict[str, Any]:
    parallel.start()
    with parallel.stoppable(), parallel.together():
        return _run_recipe(options)


def _search(options: argparse.Namespace) -> dict[str, Any]:
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
    evaluation.plot_search(found, config.cost, picture)
    print(f"picture: {picture}", file=sys.stderr)
    front = [candidate.to_json() for candidate in pruning.pareto(found)]
    return {"directory": str(directory), "front": front, "shapes": len(found)}


def _compile(options: argparse.Namespace) -> dict[str, Any]:
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
    if "://" in out:
        raise InputError(f"--out {out}: must be a local or mounted directory")
    return recipe, epath.Path(out)


def _run_recipe(options: argparse.Namespace) -> dict[str, Any]:
    recipe, directory = _recipe_and_directory(options)
    typed = ["scripts/run", options.config, *(f"--set={text}" for text in options.set)]
    typed += ["--out", options.out] if options.out else []
    profile = training.parse_steps(options.profile) if options.profile else None
    run = stages.Run(recipe, directory, commands=(shlex.join(typed),), profile=profile)
    figures = pipeline.run(
        stages.all_stages(run), directory, command=options.stage, overwrite=options.overwrite
    )
    page = directory / "report" / "index.html"
    if options.stage in (None, "report") and parallel.is_main():
        print(f"report: {page}", file=sys.stderr)
    return {"directory": str(directory), "stages": figures}


def _generate(options: argparse.Namespace) -> dict[str, Any]:
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


def _inspect(options: argparse.Namespace) -> dict[str, Any]:
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


def _verify(options: argparse.Namespace) -> dict[str, Any]:
    if options.teacher and not options.corpus:
        raise InputError("verify: --teacher needs --corpus")
    corpus = data.open_corpus(options.corpus, options.split) if options.corpus else None
    model = models.load(options.teacher) if options.teacher else None
    found = dict(teachers.verify(options.store, corpus=corpus, model=model, sample=options.sample))
    if not options.json:
        print(json.dumps(found, indent=2))
    return found


if __name__ == "__main__":
    sys.exit(main())
