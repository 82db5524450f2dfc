"""What the Llama recipes would take on TPU slices, one line each: memory, step, MFU.

    python scripts/compile_table.py [--only 1B 3B] [--small] [--json]

needs the `tpu` extra (libtpu holds the compiler) and no TPU. Nothing is executed: memory is what
the compiler sets aside and its own peak, time is modelled. A line takes some minutes unless it
was compiled before; `--small` compiles the tiny recipe for a v5e:4x4 in less than one.
"""

import argparse
import json
import pathlib
import sys

import jax
import rich.console

from distill_jax import planning
from distill_jax.parallel import Topology
from distill_jax.planning import show
from distill_jax.planning.compiling import worst

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
IDS_64 = ("targets.schemes.samples.tau=0.0158",)  # at most 64 ids a token and teacher
LONG = (*IDS_64, "corpus.sequence_length=32768")
SHARED = (*LONG, "mesh.fsdp=64", "mesh.sequence=4")
LONGEST = ("corpus.sequence_length=131072", "mesh.fsdp=16", "mesh.sequence=16")
PARTS_OF_256 = (*IDS_64, "mesh.fsdp=256")
REPLICAS = (*PARTS_OF_256, "mesh.data=16")
ROWS = (
    # name, recipe, overrides, stage, slice, rows a device, what is recomputed
    ("1B, one row", "llama3_2_1b", IDS_64, "distill", "v5e:16x16", 1, "full"),
    ("1B, one row, attention kept", "llama3_2_1b", IDS_64, "distill", "v5e:16x16", 1, "attention"),
    ("1B, four rows", "llama3_2_1b", IDS_64, "distill", "v5e:16x16", 4, "full"),
    ("1B, 16 rows", "llama3_2_1b", IDS_64, "distill", "v5e:16x16", 16, "full"),
    ("1B on v5p", "llama3_2_1b", IDS_64, "distill", "v5p:4x4x8", 4, "attention"),
    ("1B on v6e", "llama3_2_1b", IDS_64, "distill", "v6e:16x16", 4, "attention"),
    ("1B, on 256 chips", "llama3_2_1b", PARTS_OF_256, "distill", "v5p:4x8x8", 1, "full"),
    ("1B, on 4,096 chips", "llama3_2_1b", REPLICAS, "distill", "v5p:16x16x16", 1, "full"),
    ("3B, one row", "llama3_2_3b", IDS_64, "distill", "v5e:16x16", 1, "full"),
    ("3B, one row, attention kept", "llama3_2_3b", IDS_64, "distill", "v5e:16x16", 1, "attention"),
    ("1B, long rows", "llama3_2_1b", LONG, "distill", "v5e:16x16", 1, "full"),
    ("1B, long rows of four chips", "llama3_2_1b", SHARED, "distill", "v5e:16x16", 1, "full"),
    (
        "1B, longest rows, of 16 chips",
        "llama3_2_1b",
        (*IDS_64, *LONGEST),
        "distill",
        "v5e:16x16",
        1,
        "full",
    ),
    ("1B, live 8B", "llama3_2_1b", ("live=8b",), "distill", "v5e:16x16", 1, "full"),
    ("1B, live 8B and 70B", "llama3_2_1b", ("live=both",), "distill", "v5e:16x16", 1, "full"),
    ("70B's targets", "llama3_2_1b", (), "targets", "v5e:16x16", 1, None),
    ("70B's longest targets, of 16 chips", "llama3_2_1b", LONGEST, "targets", "v5e:16x16", 1, None),
    ("1B, sft", "llama3_2_1b", (), "sft", "v5e:16x16", 1, "full"),
    ("1B, on-policy", "llama3_2_1b", ("on_policy=gkd",), "on-policy", "v5e:16x16", 1, "full"),
    ("1B, dpo", "llama3_2_1b", (), "dpo", "v5e:16x16", 1, "full"),
)
SMALL = (("tiny", "tiny", (), "distill", "v5e:4x4", 1, None),)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="lines whose name has such a part")
    parser.add_argument("--small", action="store_true", help="the tiny recipe alone")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    console = rich.console.Console(quiet=options.json, width=120)
    reports = []
    for name, config, overrides, stage, topology, batch, remat in SMALL if options.small else ROWS:
        if not any(part in name for part in options.only):
            continue
        question = planning.Question(
            config=str(CONFIGS / f"{config}.py"), overrides=overrides, stage=stage
        )
        choice = planning.Choice(batch=batch, remat=remat)
        report = worst(planning.answer(question, choice, Topology.parse(topology)))
        reports.append(report)
        if options.json:
            print(json.dumps({"row": name, **report.line(None)}), flush=True)
        elif not report.fits:
            console.print(f"{name}: {report.problem}")
    console.print(show.show_choices(reports, None, "nothing was executed", None))
    if not all(report.fits for report in reports):
        sys.exit(1)


if __name__ == "__main__":
    main()
