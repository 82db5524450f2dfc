"""Compiles in a process of its own: the compiler may crash, and takes its memory with it."""

import dataclasses
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any

from distill_jax import artifacts, parallel
from distill_jax.parallel import MeshConfig, Topology
from distill_jax.planning.program import Choice, Program, Stage
from distill_jax.planning.programs import stage_programs
from distill_jax.planning.report import Report, make_report
from distill_jax.recipe import Recipe, load_recipe

COMMAND = (sys.executable, "-c", "from distill_jax.planning import worker; worker.main()")
"""Reads what is asked as JSON and ends with a report as one line of JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """What is planned.

    Attributes:
      config: the recipe's file.
      overrides: of the recipe, as `load_recipe` takes them.
      stage: one of its stages.
      teacher: whose targets are written; None: the largest's.
      text: a directory in which compiled programs are left; the cache is then not read.
    """

    config: str
    overrides: tuple[str, ...] = ()
    stage: Stage = "distill"
    teacher: str | None = None
    text: str | None = None

    @functools.cached_property
    def recipe(self) -> Recipe:
        """The run."""
        return load_recipe(self.config, self.overrides)

    @property
    def trains(self) -> bool:
        """Whether there is a backward pass."""
        return self.stage in ("distill", "sft", "on-policy", "dpo")

    @property
    def shares_rows(self) -> bool:
        """Whether several devices may work on one row."""
        return self.stage in ("targets", "distill", "sft", "on-policy")

    def programs(self, choice: Choice, topology: Topology) -> list[Program]:
        """What the stage runs.

        Raises:
          InputError: as `stage_programs`, or the compiler is not installed.
        """
        devices = topology.devices()
        return stage_programs(self.recipe, self.stage, choice, devices, teacher=self.teacher)


def compile_apart(
    question: Question, choice: Choice, topology: Topology, index: int
) -> Report | str:
    """The report of one of the stage's programs, or how the compiler crashed over it."""
    asked = {
        "question": dataclasses.asdict(question),
        "choice": dataclasses.asdict(choice),
        "topology": str(topology),
        "index": index,
    }
    ended = subprocess.run(
        COMMAND,
        input=json.dumps(asked),
        # With a filtered traceback the last line would be about the filter.
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_TRACEBACK_FILTERING": "off"},
        capture_output=True,
        text=True,
    )
    if ended.returncode == 0:
        return Report(**json.loads(ended.stdout.splitlines()[-1]))
    if ended.returncode < 0:
        return f"the compiler crashed ({signal.Signals(-ended.returncode).name})"
    lines = ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"]
    return f"the compiler failed ({lines[-1]})"


def compile_here(asked: dict[str, Any]) -> Report:
    """The report that `compile_apart` asks for, compiled in this process."""
    question = Question(**asked["question"] | {"overrides": tuple(asked["question"]["overrides"])})
    mesh = asked["choice"]["mesh"]
    choice = Choice(**asked["choice"] | {"mesh": mesh and MeshConfig(**mesh)})
    topology = Topology.parse(asked["topology"])
    program = question.programs(choice, topology)[asked["index"]]
    try:
        compiled = parallel.compile_lowered(program.lower())
    except parallel.OutOfMemory as refusal:
        return make_report(program, topology, refusal)
    if question.text is not None:
        place = pathlib.Path(question.text) / text_file(program, topology)
        artifacts.write_bytes(place, compiled.as_text().encode())
    return make_report(program, topology, compiled)


def text_file(program: Program, topology: Topology) -> str:
    """The name of a compiled program's text: each choice of a sweep has its own."""
    mesh = [f"{name}{size}" for name, size in program.mesh.shape.items()]
    parts = [program.name, str(topology), *mesh, f"batch{program.batch}", program.remat]
    return "-".join(parts).replace(" ", "-").replace(":", "-") + ".hlo"


def main() -> None:
    """What `COMMAND` runs."""
    print(json.dumps(compile_here(json.load(sys.stdin)).to_json()))
