"""What a job says, checked before anything is asked of the cloud."""

import dataclasses
import difflib
import os
import pathlib
import re
import shlex
import tomllib
from collections.abc import Mapping
from typing import Literal

import pydantic

from distill_jax.artifacts import InputError
from distill_jax.parallel import EXIT_AGAIN, Topology
from distill_jax.recipe import load_recipe

Platform = Literal["queued-resources", "gke"]
MOUNT = "/bucket"
# Of the command; others are worth another try.
FINAL = (0, 1, 2, 130)
# Slices of two axes that there are; of three, axes of 4n chips and the small ones.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
_NAME = r"[a-z](?:[-a-z0-9]{0,37}[a-z0-9])?"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a recipe on slices that are its own.

    Attributes:
      name: of the run and of what is made for it.
      platform: who gives the slices.
      topology: of one slice, such as v5e:16x16.
      slices: how many.
      spot: whether they may be taken away.
      project: the cloud project.
      zone: where; the cluster's zone or region.
      bucket: gs://NAME, where everything stays.
      image: what every host runs.
      restarts: how often it may begin again.
      recipe: a config file of the image and of this checkout.
      set: overrides of the recipe, name=value.
      environment: variables of the command.
      cluster: the GKE cluster.
      queue: its Kueue queue, if it has one.
    """

    name: str
    platform: Platform
    topology: str
    project: str
    zone: str
    bucket: str
    image: str
    recipe: str
    slices: int = 1
    spot: bool = False
    restarts: int = 100
    set: list[str] = dataclasses.field(default_factory=list)
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cluster: str | None = None
    queue: str | None = None

    @property
    def slice(self) -> Topology:
        """The topology."""
        return Topology.parse(self.topology)

    @property
    def shape(self) -> str:
        """Chips along each axis, AxB."""
        return self.topology.partition(":")[2]

    @property
    def chips_per_host(self) -> int:
        """Of a slice of one host all; of others 4."""
        return self.slice.chips if self.shape in ("1x1", "2x2", "2x4") else 4

    @property
    def hosts(self) -> int:
        """Of one slice."""
        return self.slice.chips // self.chips_per_host

    @property
    def variables(self) -> dict[str, str]:
        """The command's environment: what the job says, and where compiled programs are kept."""
        return {"JAX_COMPILATION_CACHE_DIR": f"{MOUNT}/compiled", **self.environment}

    @property
    def command(self) -> str:
        """What each host does in the image, as bash reads it; the same command goes on."""
        bucket = self.bucket.removeprefix("gs://")
        run = ["distill-jax", "run", self.recipe, *(f"--set={text}" for text in self.set)]
        run += ["--out", f"{MOUNT}/runs/{self.name}"]
        # Hosts read what the first has just written.
        mount = f"gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 {bucket} {MOUNT}"
        # A bucket that does not answer now may do so later.
        return f"{{ mkdir -p {MOUNT} && {mount}; }} || exit {EXIT_AGAIN}; exec {shlex.join(run)}"


def load_job(path: str | os.PathLike[str]) -> Job:
    """Reads and checks a job.

    Raises:
      InputError: one line that names the file and the field.
    """
    try:
        table = tomllib.loads(pathlib.Path(path).read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: {reason}") from error
    known = [field.name for field in dataclasses.fields(Job)]
    for name in table:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
            raise InputError(f"{path}: unknown field {name!r}; {hint}")
    try:
        job = pydantic.TypeAdapter(Job).validate_python(table)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or str(first["msg"])
        raise InputError(f"{path}: {name}: {first['msg'].lower()}") from error
    try:
        _check(job)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return job


def _check(job: Job) -> None:
    for name in ("project", "zone", "image"):
        if not re.fullmatch(r"[^\s'\"$`\\]+", getattr(job, name)):
            raise InputError(f"{name}: {getattr(job, name)!r} is no name")
    if not re.fullmatch(_NAME, job.name):
        raise InputError(f"name: {job.name!r} is not of at most 39 of a-z, 0-9 and -, a-z first")
    if not re.fullmatch(r"gs://[a-z0-9][-a-z0-9_.]+[a-z0-9]", job.bucket):
        raise InputError(f"bucket: {job.bucket!r} is not gs://NAME")
    for name, least in (("slices", 1), ("restarts", 0)):
        if getattr(job, name) < least:
            raise InputError(f"{name}: {getattr(job, name)} is less than {least}")
    _check_topology(job)
    if (job.platform == "gke") != (job.cluster is not None):
        needs = "is missing; gke needs one" if job.platform == "gke" else "is of gke alone"
        raise InputError(f"cluster: {needs}")
    if job.queue is not None and job.platform != "gke":
        raise InputError("queue: is of gke alone")
    for name in job.environment:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise InputError(f"environment: {name!r} is no name of a variable")
    before = dict(os.environ)
    os.environ.update(job.environment)  # recipes read them
    try:
        load_recipe(job.recipe, job.set)
    finally:
        os.environ.clear()
        os.environ.update(before)


def _check_topology(job: Job) -> None:
    there, shape = job.slice, job.shape
    if there.chip.axes == 2:
        offered, words = shape in _FLAT, ", ".join(_FLAT)
    else:
        whole = all(size % 4 == 0 for size in there.sizes)
        offered = shape in _DEEP or (whole and sorted(there.sizes) == list(there.sizes))
        words = f"{', '.join(_DEEP)} and rising multiples of 4"
    if not offered:
        raise InputError(f"topology {job.topology}: Google Cloud offers {words}")
    if job.slices > 1 and job.hosts == 1:
        raise InputError(f"slices: {job.slices} of {job.topology}, one host each, cannot be joined")
