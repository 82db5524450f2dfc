"""Runs stages in order: skips what is done, goes on with what is not, refuses what does not fit.

A stage owns one directory. `started.json` says for which recipe and inputs work began there;
`manifest.json`, written last, says that it ended and what came of it. Both are written whole or
not at all, so a kill at any moment leaves either a stage that is done or one that can go on.
"""

import dataclasses
import datetime
import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from distill_jax import artifacts
from distill_jax.artifacts import InputError

MANIFEST = "manifest.json"
_STARTED = "started.json"
_VERSIONED = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a run.

    Attributes:
      name: its directory, below the run's; parts separated by "/".
      command: the stage of the command line that it belongs to; several seeds or teachers share
        one.
      recipe: JSON value of everything in the recipe that decides its result.
      inputs: names of the stages whose directories it reads; they must come before it.
      work: fills the directory and returns figures (JSON values). Called again on a directory
        where an earlier call was killed, it must end with the same result.
      external: fingerprints of files outside the run that it reads.
    """

    name: str
    command: str
    recipe: Any
    inputs: Sequence[str]
    work: Callable[[epath.Path], Mapping[str, Any]]
    external: Mapping[str, str] = dataclasses.field(default_factory=dict)


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide what a run computes."""
    found = {name: importlib.metadata.version(name) for name in _VERSIONED}
    return {"python": platform.python_version(), **found}


def read_manifest(directory: epath.Path) -> dict[str, Any]:
    """The manifest of a finished stage.

    Raises:
      InputError: the stage has not ended.
    """
    if not (directory / MANIFEST).exists():
        raise InputError(f"{directory}: this stage has not been run to its end")
    return artifacts.read_json(directory / MANIFEST)


def run(
    stages: Sequence[Stage],
    directory: epath.Path,
    *,
    command: str | None = None,
    overwrite: bool = False,
) -> dict[str, Mapping[str, Any]]:
    """Brings every stage to its end, in order.

    Args:
      stages: all stages of the run.
      directory: the run's directory.
      command: run only the stages of this command; those they read must have ended.
      overwrite: do a stage again when what stands in its directory is for another recipe.

    Returns:
      Stage name -> its figures.

    Raises:
      InputError: a directory holds the result of another recipe, or an input is missing.
    """
    fingerprints: dict[str, str] = {}
    figures: dict[str, Mapping[str, Any]] = {}
    needed = [stage for stage in stages if command in (None, stage.command)]
    reads = {name for stage in needed for name in stage.inputs}
    for stage in stages:
        place = directory / stage.name
        if stage not in needed:
            if stage.name in reads and not (place / MANIFEST).exists():
                raise InputError(
                    f"{place}: not there yet; run the stage {stage.command!r} before {command!r}"
                )
            if (place / MANIFEST).exists():
                fingerprints[stage.name] = read_manifest(place)["fingerprint"]
            continue
        manifest = _run_one(stage, place, fingerprints, overwrite)
        fingerprints[stage.name] = manifest["fingerprint"]
        figures[stage.name] = manifest["figures"]
    return figures


def _run_one(
    stage: Stage, place: epath.Path, fingerprints: Mapping[str, str], overwrite: bool
) -> dict[str, Any]:
    identity = {
        "stage": stage.name,
        "recipe": stage.recipe,
        "inputs": {name: fingerprints[name] for name in stage.inputs} | dict(stage.external),
    }
    fingerprint = artifacts.fingerprint(identity)
    trash = place.parent / f".{place.name}.old"
    if trash.exists():
        trash.rmtree()
    for name in (MANIFEST, _STARTED):
        if not (place / name).exists():
            continue
        found = artifacts.read_json(place / name)
        if found["fingerprint"] == fingerprint:
            if name == MANIFEST:
                print(f"{stage.name}: done before", file=sys.stderr)
                return found
        elif overwrite:
            # Renamed first: a kill in the middle must not leave half a result without its marker.
            place.rename(trash)
            trash.rmtree()
        else:
            changes = artifacts.diff({key: found[key] for key in identity}, identity)
            raise InputError(
                f"{place} holds the result of another recipe ({'; '.join(changes)}); "
                "use --overwrite to replace it, or another --out"
            )
    place.mkdir(parents=True, exist_ok=True)
    artifacts.write_json(place / _STARTED, {**identity, "fingerprint": fingerprint})
    print(f"{stage.name}: starting", file=sys.stderr)
    start = time.monotonic()
    figures = dict(stage.work(place))
    manifest = {
        **identity,
        "fingerprint": fingerprint,
        "versions": versions(),
        "seconds": round(time.monotonic() - start, 1),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "figures": figures,
    }
    artifacts.write_json(place / MANIFEST, manifest)
    (place / _STARTED).unlink()
    print(f"{stage.name}: done in {manifest['seconds']:.0f} s", file=sys.stderr)
    return manifest
