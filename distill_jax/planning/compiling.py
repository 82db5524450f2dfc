"""Compiles what a stage runs, and searches for what would run better, or at all."""

import dataclasses
import typing
from collections.abc import Sequence

from distill_jax import progress
from distill_jax.artifacts import InputError
from distill_jax.models.llama import Remat
from distill_jax.parallel import MeshConfig, Topology
from distill_jax.planning import cache, worker
from distill_jax.planning.program import Choice
from distill_jax.planning.report import Report, crashed_report
from distill_jax.planning.shapes import known_teachers
from distill_jax.planning.worker import Question

HEADROOM = 0.9
"""Of the memory a program may have, what a recommended one takes at most: the runtime and data on
their way to the device want some too."""

_BATCHES = (1, 2, 4, 8, 16, 32)
_LARGER_SLICES = 3
_SHARING = (2, 4, 8)
_LONG = 2**14
"""Tokens of a row from which on devices that share it are tried though it fits one."""
_WORTH = 1.01
"""What a larger batch must gain in speed for a still larger one to be tried."""


def answer(question: Question, choice: Choice, topology: Topology) -> list[Report]:
    """A report of each program of the stage, from the cache or compiled now.

    Raises:
      InputError: the compiler is not installed, or the stage cannot run so.
    """
    programs = question.programs(choice, topology)
    shapes = [question.teacher, *map(repr, known_teachers(question.recipe))]
    key = cache.key(question.recipe, question.stage, choice, topology, shapes)
    if question.text is None and (found := cache.read(key)) is not None:
        return found
    reports = []
    for index, program in enumerate(programs):
        made = worker.compile_apart(question, choice, topology, index)
        reports.append(crashed_report(program, topology, made) if isinstance(made, str) else made)
    if all(report.hbm is not None for report in reports):  # a crash may be of this machine's making
        cache.write(key, reports)
    return reports


def worst(reports: Sequence[Report]) -> Report:
    """Of a stage's programs the one that needs most memory: it decides whether the stage fits."""
    return max(reports, key=lambda report: (not report.fits, report.hbm or 0.0))


def would_fit(question: Question, topology: Topology, refused: Report) -> list[Report]:
    """What would fit instead, by trying: full remat, fewer rows at a time or a part of one, a
    larger slice.

    Args:
      question: what is planned.
      topology: on what.
      refused: the report of what does not fit.

    Returns:
      The first of each kind that fits; kinds without any are left out.
    """
    ways = _ways(question, topology, refused)
    found = []
    with progress.bar("what would fit", sum(map(len, ways)), unit="tries") as bar:
        for way in ways:
            for other, slice_ in way:
                report = _try(question, other, slice_)
                bar.advance()
                if isinstance(report, Report) and report.fits:
                    found.append(report)
                    break
    return found


def _ways(
    question: Question, topology: Topology, refused: Report
) -> list[list[tuple[Choice, Topology]]]:
    """Kinds of change; of each the least first."""
    mesh = MeshConfig(**refused.mesh)
    choice = Choice(batch=refused.batch, remat=refused.remat, mesh=mesh)  # type: ignore[arg-type]
    remat: list[tuple[Choice, Topology]] = []
    if question.trains and refused.remat != "full":
        remat = [(dataclasses.replace(choice, remat="full"), topology)]
    rows: list[tuple[Choice, Topology]] = []
    if refused.tokens:  # what reads no rows needs no less with fewer of them
        halves = [refused.batch >> n for n in range(1, refused.batch.bit_length())]
        rows = [(dataclasses.replace(choice, batch=batch), topology) for batch in halves]
    slices: list[tuple[Choice, Topology]] = []
    larger = topology.larger()
    while larger is not None and len(slices) < _LARGER_SLICES:
        batch = max(refused.batch * topology.chips // larger.chips, 1)
        wider = dataclasses.replace(mesh, fsdp=-1)
        slices.append((dataclasses.replace(choice, batch=batch, mesh=wider), larger))
        larger = larger.larger()
    shared: list[tuple[Choice, Topology]] = []
    if question.shares_rows and refused.batch == 1:
        shared = [
            (dataclasses.replace(choice, batch=1, mesh=longer), topology)
            for longer in _sharing(mesh)
        ]
    return [remat, rows, shared, slices]


def _sharing(mesh: MeshConfig) -> list[MeshConfig]:
    """The same devices, of which more and more share a row; of the mesh all sizes are given."""
    found = []
    for devices in _SHARING:
        fsdp, rest = divmod(mesh.fsdp, devices)
        if not rest:
            sequence = mesh.sequence * devices
            found.append(dataclasses.replace(mesh, fsdp=fsdp, sequence=sequence, fsdp_minor=None))
    return found


def _try(question: Question, choice: Choice, topology: Topology) -> Report | InputError:
    try:
        return worst(answer(question, choice, topology))
    except InputError as error:
        return error


def sweep(
    question: Question,
    topology: Topology,
    *,
    batches: Sequence[int | None] = (),
    remats: Sequence[Remat | None] = (),
    meshes: Sequence[MeshConfig | None] = (),
) -> list[Report]:
    """Reports of every mesh and remat with growing batches.

    None stands for what the recipe says. A batch is not tried if the one before did not fit, or was
    hardly faster than the one before that.

    Args:
      question: what is planned.
      topology: on what.
      batches: rows at a time on each device, rising; empty: powers of two.
      remats: empty: all. Without a backward pass they are not looked at.
      meshes: empty: `usual_meshes`; and, if rows are long or no choice has room for one, meshes
        whose devices share rows.

    Raises:
      InputError: none of them can run.
    """
    if not question.trains:
        remats = (None,)  # there is nothing to be computed again
    remats = remats or typing.get_args(Remat)
    batches = batches or _BATCHES
    reports, errors = _grown(question, topology, meshes or usual_meshes(topology), remats, batches)
    long = any(report.tokens >= _LONG * report.rows for report in reports)
    if not meshes and question.shares_rows and (long or not any(one.fits for one in reports)):
        shared = _sharing(MeshConfig(fsdp=topology.chips))
        more, refused = _grown(question, topology, shared, remats, batches)
        reports, errors = reports + more, errors + refused
    if not reports:
        raise errors[0]
    return reports


def _grown(
    question: Question,
    topology: Topology,
    meshes: Sequence[MeshConfig | None],
    remats: Sequence[Remat | None],
    batches: Sequence[int | None],
) -> tuple[list[Report], list[InputError]]:
    """Reports of every mesh and remat, of each with growing batches; and what cannot run."""
    reports, errors = [], []
    pairs = [(mesh, remat) for mesh in meshes for remat in remats]
    with progress.bar("sweep", len(pairs), unit="meshes and remats") as bar:
        for mesh, remat in pairs:
            fastest = 0.0
            for batch in batches:
                report = _try(question, Choice(batch=batch, remat=remat, mesh=mesh), topology)
                if isinstance(report, InputError):
                    errors.append(report)
                    break
                reports.append(report)
                speed = report.tokens_per_second or 0.0
                if not report.fits or speed < _WORTH * fastest:
                    break
                fastest = max(speed, fastest)
            bar.advance()
    return reports, errors


def usual_meshes(topology: Topology) -> list[MeshConfig]:
    """One FSDP group; replicas along an axis of the slice; and these with two tensor shards."""
    replicas = topology.sizes[-1]
    found = [MeshConfig()]
    if 1 < replicas < topology.chips:
        found.append(MeshConfig(data=replicas))
    if topology.chips % (2 * replicas) == 0:
        found.append(MeshConfig(data=replicas, tensor=2))
    return found


def recommended(reports: Sequence[Report]) -> Report | None:
    """The fastest that leaves room; of those within 1% of it, the one that needs least memory."""
    fitting = [report for report in reports if report.fits]
    roomy = [r for r in fitting if (r.hbm or 0.0) <= HEADROOM * r.available] or fitting
    if not roomy:
        return None
    fastest = max(report.tokens_per_second or 0.0 for report in roomy)
    near = [r for r in roomy if (r.tokens_per_second or 0.0) * _WORTH >= fastest]
    return min(near, key=lambda report: report.hbm or 0.0)
