"""Compiled programs stay on disk."""

import os
import pathlib
import stat
import zlib

import jax

from distill_jax.parallel import processes

_CHECKED = "checked"  # its time says when entries were looked at last
_SECONDS = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def keep_compiled() -> None:
    """Keeps what is compiled from now on for later processes, and uses what earlier ones kept.

    A run that goes on after it was stopped then begins at once, and so does the next seed.
    Programs lie in JAX_COMPILATION_CACHE_DIR or, if that is not set and this process is alone, in
    the user's own cache, $XDG_CACHE_HOME or ~/.cache: of several processes JAX lets the first one
    alone write, so that they need a directory which all of them read.
    JAX_ENABLE_COMPILATION_CACHE=0 keeps none. JAX tells programs apart by their text, devices,
    options and version.
    """
    if _SECONDS not in os.environ:
        # Small models have many programs that take less than JAX's second.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if jax.config.values["jax_compilation_cache_dir"] is not None or processes.count() > 1:
        return
    place = _directory()
    if place is not None:
        _drop_cut_entries(place)
        jax.config.update("jax_compilation_cache_dir", str(place))


def _directory() -> pathlib.Path | None:
    """A directory of this user, into which nobody else can write: programs in it are run."""
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        place = pathlib.Path(cache, "distill_jax", "compiled")
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = place.stat()
    except (OSError, RuntimeError):  # no home, or one that cannot be written to
        return None
    private = about.st_uid == os.getuid() and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return place if private and os.access(place, os.W_OK) else None


def _drop_cut_entries(place: pathlib.Path) -> None:
    """Removes what a process was writing as it was killed.

    JAX writes entries in place and replaces none, so that one which is cut would be complained of
    for ever. It compresses them by zlib, but where zstandard is installed; those are left alone.
    """
    stamp = place / _CHECKED
    since = stamp.stat().st_mtime if stamp.exists() else 0.0
    stamp.touch(mode=0o600)
    for entry in place.glob("*-cache"):
        try:
            if entry.stat().st_mtime >= since and not _is_whole(entry.read_bytes()):
                entry.unlink()
        except OSError:  # another process has done so
            continue


def _is_whole(compressed: bytes) -> bool:
    unpacked = zlib.decompressobj()
    try:
        unpacked.decompress(compressed)
    except zlib.error:
        return bool(compressed)  # of another kind
    return unpacked.eof
