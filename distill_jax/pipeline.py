"""Runs stages in order: skips what is done, goes on with what is not, refuses what does not fit.

A stage owns one directory. `started.json` says for which recipe and inputs work began there;
`manifest.json`, written last, says that it ended and what came of it. Both are written whole or
not at all, so a kill at any moment leaves either a stage that is done or one that can go on.

Several processes run the same stages together. The first alone claims directories and says that
work has ended; the work is everyone's.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from distill_jax import artifacts, parallel
from distill_jax.artifacts import InputError

MANIFEST = "manifest.json"
"""The file that a finished stage leaves last."""
_STARTED = "started.json"
_VERSIONED = (
    "distill-jax",
    "jax",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
)


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
    return artifacts.read_object(directory / MANIFEST)


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
      Preempted: the job was told to stop (`parallel.stoppable`).
    """
    fingerprints: dict[str, str] = {}
    figures: dict[str, Mapping[str, Any]] = {}
    wanted = [stage for stage in stages if command in (None, stage.command)]
    if not wanted:
        raise InputError(f"the recipe has no stage {command!r}")
    read = _inputs_of(wanted, stages)
    with parallel.together(), _alone(directory):
        for stage in stages:
            if stage in wanted:
                manifest = _run_one(stage, directory / stage.name, fingerprints, overwrite)
                figures[stage.name] = manifest["figures"]
            elif stage.name in read:
                place = directory / stage.name
                if not (place / MANIFEST).exists():
                    raise InputError(
                        f"{place}: not there yet; run the stage {stage.command!r} before "
                        f"{command!r}"
                    )
                try:
                    manifest = _fitting(place, MANIFEST, _identity(stage, fingerprints))
                except _OtherRecipe as error:
                    raise InputError(
                        f"{error}; run {stage.command!r} with --overwrite before {command!r}"
                    ) from None
            else:
                continue
            fingerprints[stage.name] = manifest["fingerprint"]
    return figures


def _inputs_of(wanted: Sequence[Stage], stages: Sequence[Stage]) -> set[str]:
    """Names of all stages that the wanted ones read, and that those read, and so on."""
    by_name = {stage.name: stage for stage in stages}
    found: set[str] = set()
    waiting = [name for stage in wanted for name in stage.inputs]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(by_name[name].inputs)
    return found


@contextlib.contextmanager
def _alone(directory: epath.Path) -> Iterator[None]:
    """Holds the run's directory, since two runs in it would spoil each other's work."""
    if not parallel.is_main() or artifacts.is_remote(directory):  # a bucket has no locks
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{directory}: another run is at work there") from None
        yield


def _identity(stage: Stage, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """What decides a stage's result, with its fingerprint."""
    identity = {
        "stage": stage.name,
        "recipe": stage.recipe,
        "inputs": {name: fingerprints[name] for name in stage.inputs} | dict(stage.external),
    }
    return {**identity, "fingerprint": artifacts.fingerprint(identity)}


class _OtherRecipe(InputError):
    """A stage's directory was made by this program for another recipe; --overwrite may clear it."""


def _fitting(place: epath.Path, name: str, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What a marker file says, if it is of this recipe.

    Raises:
      InputError: it is of another; the message has the difference.
    """
    found = artifacts.read_json(place / name)
    if not isinstance(found, dict) or found.get("stage") != identity["stage"]:
        raise InputError(f"{place / name}: not written by this program; use another --out")
    if found["fingerprint"] != identity["fingerprint"]:
        keys = identity.keys() - {"fingerprint"}
        changes = artifacts.diff(
            {key: found[key] for key in keys}, {key: identity[key] for key in keys}
        )
        raise _OtherRecipe(f"{place} holds the result of another recipe ({'; '.join(changes)})")
    return found


def _claim(place: epath.Path, identity: Mapping[str, Any], overwrite: bool) -> None:
    """Makes the directory this stage's: new, begun before, or cleared of another recipe's result.

    Raises:
      InputError: something else is there.
    """
    trash = place.parent / f".{place.name}.old"
    if trash.exists():
        trash.rmtree()
    markers = [name for name in (MANIFEST, _STARTED) if (place / name).exists()]
    for name in markers:
        try:
            _fitting(place, name, identity)
        except _OtherRecipe as error:
            if not overwrite:
                raise InputError(
                    f"{error}; use --overwrite to replace it, or another --out"
                ) from None
            # Renamed first: a kill in the middle must not leave half a result without its marker.
            place.rename(trash)
            trash.rmtree()
            break
    place.mkdir(parents=True, exist_ok=True)
    foreign = [] if markers else [e for e in place.iterdir() if not e.name.startswith(".")]
    if foreign:
        raise InputError(f"{foreign[0]}: is in the way; use another --out")


def _run_one(
    stage: Stage, place: epath.Path, fingerprints: Mapping[str, str], overwrite: bool
) -> dict[str, Any]:
    identity = _identity(stage, fingerprints)
    parallel.stop_if_preempted(f"before {stage.name}")
    done = parallel.on_main(lambda: _begin(place, identity, overwrite), what=stage.name)
    if done is not None:
        return done
    start = time.monotonic()
    figures = dict(stage.work(place))
    seconds = round(time.monotonic() - start, 1)
    parallel.barrier(f"the end of {stage.name}")
    return parallel.on_main(lambda: _end(place, identity, figures, seconds), what=stage.name)


def _begin(
    place: epath.Path, identity: Mapping[str, Any], overwrite: bool
) -> dict[str, Any] | None:
    """Claims a stage's directory; returns its manifest if it was done before."""
    _claim(place, identity, overwrite)
    if (place / MANIFEST).exists():
        print(f"{identity['stage']}: done before", file=sys.stderr)
        return _fitting(place, MANIFEST, identity)
    artifacts.write_json(place / _STARTED, identity)
    print(f"{identity['stage']}: starting", file=sys.stderr)
    return None


def _end(
    place: epath.Path, identity: Mapping[str, Any], figures: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """Commits the manifest of a stage that has done its work, and returns it."""
    manifest = {
        **identity,
        "versions": versions(),
        "seconds": seconds,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "figures": figures,
    }
    artifacts.write_json(place / MANIFEST, manifest)
    (place / _STARTED).unlink()
    print(f"{identity['stage']}: done in {seconds:.0f} s", file=sys.stderr)
    return manifest
