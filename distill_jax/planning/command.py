"""What `distill-jax compile` does."""

import dataclasses
import math
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import jax
import rich.console
from etils import epath

from distill_jax import progress
from distill_jax.artifacts import InputError
from distill_jax.models.llama import Remat
from distill_jax.parallel import MeshConfig, Topology
from distill_jax.planning import show
from distill_jax.planning.compiling import (
    answer,
    recommended,
    sweep,
    worst,
    would_fit,
)
from distill_jax.planning.program import Choice
from distill_jax.planning.report import Report
from distill_jax.planning.worker import Question

_WIDTH = 120
"""Columns where nobody says how many there are."""


def compile_stage(
    question: Question,
    topology: Topology,
    directory: epath.Path,
    *,
    batches: Sequence[int] = (),
    remats: Sequence[Remat] = (),
    meshes: Sequence[MeshConfig] = (),
    everything: bool = False,
    price: float | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Compiles a stage for a slice, shows what it would take, and returns that as JSON.

    Args:
      question: what is planned.
      topology: on what.
      directory: of the run; a sweep's picture goes to its "compile".
      batches: rows at a time on each device; several make a sweep.
      remats: what the backward pass recomputes; several make a sweep.
      meshes: arrangements of the devices; several make a sweep.
      everything: sweep over whatever is not given.
      price: dollars a chip and hour.
      quiet: print no tables.

    Raises:
      InputError: as `stage_programs`; or a number that is not positive.
    """
    for name, values in (("--batch", batches), ("--price", () if price is None else (price,))):
        if any(not value > 0 for value in values):
            raise InputError(f"{name}: {min(values):g} is not positive")
    if question.text is not None:
        pathlib.Path(question.text).mkdir(parents=True, exist_ok=True)
    # Nothing is executed: whatever this machine has is left to those who use it.
    jax.config.update("jax_platforms", "cpu")
    console = rich.console.Console(quiet=quiet, width=None if sys.stdout.isatty() else _WIDTH)
    if everything or max(map(len, (batches, remats, meshes))) > 1:
        unsaid: Any = () if everything else (None,)  # None is what the recipe says
        reports = sweep(
            question,
            topology,
            batches=batches or unsaid,
            remats=remats or unsaid,
            meshes=meshes or unsaid,
        )
        best = recommended(reports)
        console.print(show.show_choices(reports, best, "* recommended", price))
        _draw(reports, directory)
        main = best or min(reports, key=lambda report: report.hbm or math.inf)
    else:
        choice = Choice(
            batch=next(iter(batches), None),
            remat=next(iter(remats), None),
            mesh=next(iter(meshes), None),
        )
        with progress.bar("compile", 1, unit="stages"):
            reports = answer(question, choice, topology)
        main = worst(reports)
        if len(reports) > 1:
            for report in reports:
                if report is not main:
                    console.print(show.show_report(report, price))
    console.print(show.show_report(main, price))
    line = main.line(price)
    if len(reports) > 1:
        line["reports"] = [report.line(price) for report in reports]
    if not main.fits:
        found = would_fit(question, topology, main)
        title = "this would fit" if found else "nothing that was tried fits"
        console.print(show.show_choices(found, None, title, price))
        line["would_fit"] = [report.line(price) for report in found]
    return line


def parse_mesh(text: str) -> MeshConfig:
    """A mesh from a text such as "data=16,tensor=2"; FSDP takes the devices that are left.

    Raises:
      InputError: not such a text.
    """
    sizes = re.findall(r"(\w+)=(-?\d+)", text)
    known = [field.name for field in dataclasses.fields(MeshConfig)]
    if not sizes or ",".join(f"{name}={size}" for name, size in sizes) != text:
        raise InputError(f"--mesh {text}: write it as data=16,fsdp=16,tensor=1")
    for name, _ in sizes:
        if name not in known:
            raise InputError(f"--mesh {text}: {name!r} is none of {', '.join(known)}")
    if len(dict(sizes)) < len(sizes):
        raise InputError(f"--mesh {text}: an axis is there twice")
    return MeshConfig(**{name: int(size) for name, size in sizes})


def _draw(reports: Sequence[Report], directory: epath.Path) -> None:
    from distill_jax.planning import picture  # late: Matplotlib costs most of a second

    first = reports[0]
    name = f"{first.program}-{first.topology}".replace(" ", "-").replace(":", "-")
    place = directory / "compile" / f"{name}.png"
    place.parent.mkdir(parents=True, exist_ok=True)
    picture.plot_memory(reports, place)
    print(f"picture: {place}", file=sys.stderr)
