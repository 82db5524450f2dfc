"""What stands for Google Cloud Storage."""

import os
from typing import ClassVar

import fsspec.implementations.memory


class Bucket(fsspec.implementations.memory.MemoryFileSystem):
    """A file system in memory for paths gs://..., where a file appears when it is closed."""

    cachable = False
    store: ClassVar = {}
    pseudo_dirs: ClassVar = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(os.fspath(path).replace("gs://", "/", 1))
