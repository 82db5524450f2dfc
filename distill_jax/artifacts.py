"""What every room needs to read inputs and to leave results that a crash cannot spoil."""

import contextlib
import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import gguf
import numpy as np
from etils import epath

_PACKAGE_SCHEME = "package://"
_BLOCKS, _BLOCK_BYTES = 64, 1 << 20
_FOLDER_BYTES = 4 << 30


class InputError(ValueError):
    """A wrong input: its message is one line that names the file, tensor or field at fault.

    The command line prints the message alone, without a traceback, and exits with status 2.
    """


def check_choices(config: object, literals: Mapping[str, Any]) -> None:
    """Checks that fields hold one of the words of their Literal types, by field name.

    Raises:
      InputError: one line that names the field and its choices.
    """
    for name, literal in literals.items():
        value, choices = getattr(config, name), get_args(literal)
        if value not in choices:
            raise InputError(f"{name} is {value!r}; choose one of {', '.join(choices)}")


def resolve(path: str | os.PathLike[str]) -> epath.Path:
    """The place `path` names: a local path, `gs://...` (with gcsfs), or `package://name/file`.

    `package://name/file` is a data file inside an installed Python package, found without
    importing the package.

    Raises:
      InputError: the package, or a bucket's client, is not installed, or nothing is there.
    """
    text = os.fspath(path)
    if text.startswith(_PACKAGE_SCHEME):
        name, _, inner = text.removeprefix(_PACKAGE_SCHEME).partition("/")
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise InputError(f"{text}: the Python package {name!r} is not installed")
        place = epath.Path(spec.submodule_search_locations[0]) / inner
    else:
        place = epath.Path(text).expanduser()
    try:
        found = place.exists()
    except ImportError as error:  # a bucket whose client library is not installed
        raise InputError(f"{text}: {error}") from error
    if not found:
        raise InputError(f"{text}: no such file or directory")
    return place


def fingerprint(value: Any) -> str:
    """Sixteen hex digits of SHA-256 over the canonical JSON of `value`."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_file(path: str | os.PathLike[str]) -> str:
    """Sixteen hex digits of SHA-256 over all bytes of one file."""
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Lets the system's error that names no file, such as a full disk's, name `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # others would lose their message by it
            error.filename = error.filename or os.fspath(path)
        raise


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether the path is of an object store, `gs://...`."""
    return "://" in os.fspath(path)


def size(path: str | os.PathLike[str]) -> int:
    """Bytes of a file."""
    # Of a local file epath would look up the owner's name too, who may have none.
    return epath.Path(path).stat().length if is_remote(path) else os.path.getsize(path)


def sync(path: str | os.PathLike[str]) -> None:
    """Waits until a file's bytes, or a directory's names, are on disk."""
    if is_remote(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def committed(path: str | os.PathLike[str]) -> Iterator[epath.Path]:
    """A local file to be written in the block, which becomes `path` at its end, whole or never.

    On a disk that is a temporary name, fsync, rename. An object store shows what is uploaded once
    it is there in full.
    """
    place = epath.Path(path)
    if is_remote(place):
        with tempfile.TemporaryDirectory() as directory:
            temporary = epath.Path(directory) / place.name
            with naming(temporary):
                yield temporary
            place.write_bytes(temporary.read_bytes())
        return
    temporary = place.parent / f".{place.name}.tmp"
    with naming(place):
        yield temporary
        sync(temporary)
        temporary.replace(place)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file whole or not at all: temporary name, fsync, rename."""
    with committed(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes indented JSON whole or not at all."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode())


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file.

    Raises:
      InputError: the file is missing or is not JSON.
    """
    place = epath.Path(path)
    try:
        return json.loads(place.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{place}: no such file") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not valid JSON ({error})") from error


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
      InputError: the file is missing, is not JSON, or holds something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{os.fspath(path)}: not a JSON object")
    return value


class _GgufReader(gguf.GGUFReader):
    """Takes its hundred thousand slices, two for each token, of a plain array.

    Of a memory map, which is what gguf has, one costs thrice as much.
    """

    @property
    def data(self) -> Any:
        """The file's bytes, still mapped."""
        return self._bytes

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._bytes = mapped.view(np.ndarray)


def open_gguf(path: str | os.PathLike[str]) -> gguf.GGUFReader:
    """A reader of a GGUF file, which `resolve` finds.

    Raises:
      InputError: nothing is there, or it is damaged.
    """
    place = resolve(path)
    try:
        return _GgufReader(place)
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise InputError(f"{path}: not a readable GGUF file ({error})") from error


def diff(stored: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One line, `field: stored -> wanted`, for every leaf in which two nested mappings differ."""
    lines = []
    for key in sorted(stored.keys() | wanted.keys()):
        old, new = stored.get(key), wanted.get(key)
        name = f"{prefix}{key}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += diff(old, new, f"{name}.")
        elif old != new:
            lines.append(f"{name}: {old!r} -> {new!r}")
    return lines


def fingerprint_path(path: str | os.PathLike[str]) -> str:
    """Stands for the content of what `resolve` finds: a file, or a folder's names and files.

    Of a large file, which may hold a model's weights, only its size and 64 blocks spread over it
    are read: a model that was trained on differs in all of them. Where this would be more than
    4 GiB of a folder, whose files may be a corpus, the blocks are so much smaller.

    Raises:
      InputError: nothing is there.
    """
    place = resolve(path)
    if place.is_file():
        return _hash_sample(place, _BLOCKS * _BLOCK_BYTES)
    files = files_below(place)
    share = _BLOCKS * _BLOCK_BYTES
    if sum(min(file.stat().length, share) for file in files) > _FOLDER_BYTES:
        share = max(_FOLDER_BYTES // len(files), _BLOCKS)
    return fingerprint([[str(f.relative_to(place)), _hash_sample(f, share)] for f in files])


def _hash_sample(path: epath.Path, most: int) -> str:
    size = path.stat().length
    if size <= most:
        return hash_file(path)
    digest = hashlib.sha256(str(size).encode())
    block_bytes = most // _BLOCKS
    with path.open("rb") as file:
        for block in range(_BLOCKS):
            file.seek(block * (size - block_bytes) // (_BLOCKS - 1))
            digest.update(file.read(block_bytes))
    return digest.hexdigest()[:16]


def files_below(place: epath.Path) -> list[epath.Path]:
    """All files in a directory and the directories in it, in order."""
    found = []
    for entry in sorted(place.iterdir()):
        found += files_below(entry) if entry.is_dir() else [entry]
    return found
