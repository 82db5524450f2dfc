"""A disk that is full at every place a writer can come to."""

import contextlib
import itertools
import pathlib
import resource
import subprocess
import tempfile
from collections.abc import Callable, Iterator

import victim
from tally import Tally

from distill_jax.artifacts import InputError

_PAGE = 1 << 12
_ENOUGH = 1 << 26
_REASONS = ("No space left on device", "File too large")


def measure(every: int) -> Tally:
    """Writes on disks of 1 page, 1 + `every`, and so on, until the stores fit.

    Each time the writer must fail with one line that names a file, leave no half-written shard
    under its name and no finished store that is not whole, and another must end with the right
    bytes once there is space. Where no small disk can be mounted, files are kept small instead.
    """
    mounted = _can_mount()
    tally = Tally("disk full", note="a small tmpfs" if mounted else "RLIMIT_FSIZE, without mounts")
    expected = victim.undisturbed()
    for pages in itertools.count(1, every):
        disk = _small_disk(pages * _PAGE) if mounted else _small_files(pages * _PAGE)
        with disk as (place, limit, enlarge):
            fault = _one(place, limit, enlarge, expected)
        if fault is None:
            return tally
        tally.count(not fault, f"{pages} pages: {fault}")
    raise AssertionError


def _one(
    place: pathlib.Path,
    limit: Callable[[], None],
    enlarge: Callable[[], None],
    expected: dict[str, bytes],
) -> str | None:
    """What went wrong on one disk; "" if all went well, None if the disk was never full."""
    with tempfile.TemporaryDirectory() as other:
        message = pathlib.Path(other) / "message"
        status = victim.wait(victim.start(lambda: _write(place, message, limit)))
        told = message.read_text() if message.exists() else None
    if status == 0 and told is None:
        return None
    if status or not _is_clear(told or "", place):
        return f"no clear line but {told!r}, status {status}"
    if not _all_whole(victim.contents(place), expected):
        return "half-written files were committed"
    enlarge()
    if victim.wait(victim.start(lambda: victim.write(place))):
        return "a writer with space failed"
    return "" if victim.contents(place) == expected else "other bytes in the end"


def _write(place: pathlib.Path, message: pathlib.Path, limit: Callable[[], None]) -> None:
    """Leaves the line that the command line would print; it has a traceback for other errors."""
    limit()
    try:
        victim.write(place)
    except (InputError, OSError) as error:
        message.write_text(str(error))


def _is_clear(message: str, place: pathlib.Path) -> bool:
    one_line = len(message.splitlines()) == 1
    return one_line and f"{place}/" in message and any(reason in message for reason in _REASONS)


def _all_whole(files: dict[str, bytes], expected: dict[str, bytes]) -> bool:
    """Whether shards, and all files of a finished store, are as they should be."""
    for path, data in files.items():
        store, name = path.split("/", 1)
        committed = name.startswith("teacher_") or f"{store}/store.json" in files
        if committed and expected.get(path) != data:
            return False
    return True


_Disk = Iterator[tuple[pathlib.Path, Callable[[], None], Callable[[], None]]]


@contextlib.contextmanager
def _small_disk(size: int) -> _Disk:
    """Where it is, what a process does to be limited by it, and what makes it large."""
    with tempfile.TemporaryDirectory() as place:
        _mount(place, f"size={size}")
        try:
            yield (
                pathlib.Path(place),
                lambda: None,
                lambda: _mount(place, f"remount,size={_ENOUGH}"),
            )
        finally:
            subprocess.run(["umount", place], check=True)


@contextlib.contextmanager
def _small_files(size: int) -> _Disk:
    """The same of a directory in which a process may only write files of some size."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    with tempfile.TemporaryDirectory() as place:
        yield (
            pathlib.Path(place),
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit)),
            lambda: None,
        )


def _mount(place: str, options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place]
    subprocess.run(command, check=True, capture_output=True)


def _can_mount() -> bool:
    try:
        with _small_disk(_PAGE):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False
