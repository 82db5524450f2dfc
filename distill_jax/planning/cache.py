"""Reports that were made before: compiling takes a minute or two, and gives the same each time."""

import dataclasses
import functools
import importlib.metadata
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from distill_jax import artifacts
from distill_jax.parallel import Topology
from distill_jax.planning.program import Choice, Stage
from distill_jax.planning.report import Report
from distill_jax.recipe import Recipe, to_json
from distill_jax.teachers.cache import CACHE

_COMPILERS = ("jax", "jaxlib", "libtpu", "flax", "optax")
_FLAGS = (
    "LIBTPU_INIT_ARGS",
    "XLA_FLAGS",
    "JAX_ENABLE_X64",
    "JAX_DEFAULT_MATMUL_PRECISION",
)


def key(
    recipe: Recipe, stage: Stage, choice: Choice, topology: Topology, described: Any = None
) -> str:
    """Sixteen hex digits of everything that a report depends on.

    Args:
      recipe: the run.
      stage: the stage.
      choice: what is decided otherwise.
      topology: the slice.
      described: whatever else it depends on, as JSON.
    """
    return artifacts.fingerprint(
        {
            "recipe": to_json(recipe),
            "stage": stage,
            "choice": dataclasses.asdict(choice),
            "topology": str(topology),
            "described": described,
            "versions": _versions(),
        }
    )


def read(name: str) -> list[Report] | None:
    """The reports of a key; None if there are none, or they are of another format."""
    try:
        return [Report(**value) for value in artifacts.read_json(_place(name))]
    except (artifacts.InputError, TypeError):
        return None


def write(name: str, reports: Sequence[Report]) -> None:
    """Keeps reports; where that cannot be done they are made anew next time."""
    place = _place(name)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        artifacts.write_json(place, [report.to_json() for report in reports])
    except OSError:
        return


def _place(name: str) -> pathlib.Path:
    directory = pathlib.Path(os.environ.get(CACHE) or "~/.cache/distill_jax").expanduser()
    return directory / "compiled" / f"{name}.json"


@functools.cache
def _versions() -> dict[str, str]:
    """Of the compilers, their flags, and of this package's own code."""
    package = pathlib.Path(__file__).parents[1]
    files = sorted(package.rglob("*.py"))
    code = artifacts.fingerprint([[str(f.relative_to(package)), f.read_text()] for f in files])
    versions = {name: _version(name) for name in _COMPILERS}
    return versions | {name: os.environ.get(name, "") for name in _FLAGS} | {"code": code}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
