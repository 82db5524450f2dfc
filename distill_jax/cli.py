"""The commands."""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, get_args

from distill_jax import __version__, commands, models, parallel, planning, pruning, stages
from distill_jax.artifacts import InputError

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
  distill-jax corpus configs/tiny.py --out runs/mine --runner DirectRunner
      the corpus in an Apache Beam pipeline; with DataflowRunner one beyond a machine
  distill-jax search configs/tiny.py --out runs/mine --parameters 4e5 5e5
      which shape of that size predicts best right after the cut; needs corpus and teachers
  distill-jax compile configs/llama3_2_1b.py --topology v5e:16x16 --batch 1 2 4
      what the distillation would take on a slice of TPUs, which need not be there
  distill-jax generate runs/mine/distill/seed-0 --prompt "The capital of France is"
  distill-jax average runs/*/dpo --out runs/mean
      one model of several runs, which started from the same one
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
    "posttraining-rounds": "post-train before the last round, where the recipe says so",
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
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, summary: str, work: Callable[[Any], Any]) -> argparse.ArgumentParser:
        command = subparsers.add_parser(name, help=summary, description=summary)
        command.set_defaults(work=work)
        command.add_argument(
            "--json", action="store_true", help="end with one line of JSON on standard output"
        )
        return command

    _add_recipe_options(add("run", "run all stages of a recipe", commands.run), None)
    for name in stages.COMMANDS:
        stage = add(name, _STAGE_HELP[name], commands.run)
        _add_recipe_options(stage, name)
        if name == "corpus":
            stage.add_argument(
                "--runner",
                nargs="+",
                metavar=("NAME", "OPTION=VALUE"),
                help="make the same rows in an Apache Beam pipeline: DirectRunner, DataflowRunner, "
                "... with Beam's options; --out may then be gs://",
            )
    search = add("search", "find the shape to prune to, at a given cost", commands.search)
    _add_search_options(search)
    plan = add("compile", "plan a stage on a TPU slice, without one", commands.compile)
    _add_compile_options(plan)
    summary = "let a model continue a text or answer a question"
    _add_generate_options(add("generate", summary, commands.generate))
    average = add("average", "the mean of several models of one shape", commands.average)
    average.add_argument("model", nargs="+", help="what a stage left in several runs, or the like")
    average.add_argument("--weights", type=float, nargs="+", help="one for each (default: equal)")
    average.add_argument("--out", required=True, help="a new directory, for the mean")
    inspect = add("inspect", "show what a file or directory of a run holds", commands.inspect)
    inspect.add_argument("artifact", help="a store, a stage's directory, a model, or a plan")
    inspect.add_argument(
        "--corpus", help="of a store: shows a row of it (default: that of the store's own run)"
    )
    inspect.add_argument("--split", default="train")
    inspect.add_argument("--row", type=int, default=0, help="which row of the corpus")
    inspect.add_argument("--tokens", type=int, default=32, help="how many of its tokens")
    summary = "re-hash a store of targets, and recompute some of its rows"
    verify = add("verify", summary, commands.verify)
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


def _add_generate_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="a checkpoint directory, GGUF file or Hugging Face folder")
    command.add_argument("--prompt", required=True, help="the text")
    command.add_argument(
        "--chat", action="store_true", help="the prompt is a question: use the chat template"
    )
    command.add_argument("--max-new-tokens", type=int, default=64)
    command.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    command.add_argument("--top-k", type=int, help="draw from so many tokens only")
    command.add_argument("--top-p", type=float, help="and from this share of the probability")
    command.add_argument("--min-p", type=float, help="and of this part of the likeliest's")
    command.add_argument("--seed", type=int, default=0)


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


if __name__ == "__main__":
    sys.exit(main())
