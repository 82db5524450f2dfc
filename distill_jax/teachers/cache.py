"""Local copies of a remote store's files, for readers that open nothing but a disk's."""

import os
import pathlib
import tempfile

from etils import epath

from distill_jax import artifacts
from distill_jax.artifacts import InputError
from distill_jax.teachers.manifest import Manifest

CACHE = "DISTILL_JAX_CACHE"
"""The environment variable that names the directory of the copies, otherwise
~/.cache/distill_jax. What is there may be deleted whenever no program reads it."""


class LocalFiles:
    """The files of a finished store where they can be opened.

    Those of a store on a disk are its own. Of another each file is copied whole when it is first
    asked for, compared with its hash in the manifest, and kept for later runs in a folder named
    after all hashes, so that a store that was written anew never finds the copies of the old one.

    Attributes:
      directory: where `fetch` brings files.
    """

    def __init__(self, directory: epath.Path, manifest: Manifest):
        self._source, self._hashes = directory, dict(manifest.files)
        self.directory = directory
        self._here: set[str] = set()
        if artifacts.is_remote(directory):
            place = pathlib.Path(os.environ.get(CACHE) or "~/.cache/distill_jax").expanduser()
            self.directory = epath.Path(place / "stores" / artifacts.fingerprint(self._hashes))

    def fetch(self, name: str) -> epath.Path:
        """The local path of a file of the manifest. Threads and processes may ask at once.

        Raises:
          InputError: the file is not what was written.
        """
        path = self.directory / name
        if self.directory == self._source or name in self._here:
            return path
        if not path.exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            self._copy(name, path)
        self._here.add(name)
        return path

    def _copy(self, name: str, path: epath.Path) -> None:
        # A name of its own, since another process may copy the same file.
        with tempfile.TemporaryDirectory(dir=self.directory, prefix=".copy-") as directory:
            temporary = epath.Path(directory) / name
            with artifacts.naming(temporary):
                temporary.write_bytes((self._source / name).read_bytes())
            found = artifacts.hash_file(temporary)
            if found != self._hashes[name]:
                raise InputError(
                    f"{self._source / name}: its hash does not fit the manifest "
                    f"({found}, written as {self._hashes[name]})"
                )
            temporary.replace(path)
