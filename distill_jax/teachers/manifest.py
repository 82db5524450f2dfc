"""What a store says about itself: whose words it holds, about which rows, in which form."""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from distill_jax import artifacts, models
from distill_jax.artifacts import InputError
from distill_jax.teachers import order
from distill_jax.teachers.codec import CODEC_VERSION, Codec
from distill_jax.teachers.schemes import Scheme, scheme_from_json, scheme_to_json

MANIFEST = "store.json"
"""The file that tells what a store holds."""
_SLICE_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
    """Everything that decides the bytes of a store.

    Attributes:
      teacher: fingerprint of the teacher's shape and parameters.
      tokenizer: fingerprint of the tokenizer that made the corpus.
      corpus: fingerprint of the corpus, split included.
      rows: rows of the corpus.
      rows_per_shard: rows of every shard but the last.
      sequence_length: tokens of a row.
      vocab_size: the teacher's vocabulary.
      temperature: what its logits were divided by.
      scheme: what was kept of its distributions.
      codec: version of the record's layout.
    """

    teacher: str
    tokenizer: str
    corpus: str
    rows: int
    rows_per_shard: int
    sequence_length: int
    vocab_size: int
    temperature: float
    scheme: Scheme
    codec: int = CODEC_VERSION

    def __post_init__(self):
        for name in ("rows", "rows_per_shard", "sequence_length", "vocab_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} is less than 1")

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.rows_per_shard)

    def shard_rows(self, shard: int) -> range:
        """The corpus rows of one shard."""
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.rows))

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"scheme": scheme_to_json(self.scheme)}


def make_codec(identity: Identity, token_counts: np.ndarray) -> Codec:
    """What encodes and decodes the records of a store; `token_counts` int [V] are the corpus's."""
    return Codec(
        columns=identity.scheme.columns(identity.vocab_size),
        order=order.by_frequency(token_counts),
        tokens=identity.sequence_length,
        teacher=identity.teacher,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of store.json, which is written last: a store without it is not finished.

    Attributes:
      identity: what decides the bytes.
      width: the most ids that any token has; batches are padded to it.
      tokens: tokens with targets, padding left out.
      labels: of these, tokens that have a next one.
      files: hash of every other file of the directory.
    """

    identity: Identity
    width: int
    tokens: int
    labels: int
    files: Mapping[str, str]

    def write(self, directory: str | os.PathLike[str]) -> None:
        """Writes store.json whole or not at all."""
        value: dict[str, Any] = {
            "identity": self.identity.to_json(),
            "width": self.width,
            "tokens": self.tokens,
            "labels": self.labels,
            "files": dict(self.files),
        }
        value["checksum"] = artifacts.fingerprint(value)
        artifacts.write_json(epath.Path(directory) / MANIFEST, value)


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Reads store.json.

    Raises:
      InputError: it is missing, was changed, or is of another codec version.
    """
    path = epath.Path(directory) / MANIFEST
    if not path.exists():
        raise InputError(f"{directory}: no {MANIFEST}, so this is no finished store of targets")
    value = artifacts.read_object(path)
    try:
        return _from_json(value)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not the manifest of a store ({error})") from error


def _from_json(value: dict[str, Any]) -> Manifest:
    checksum = value.pop("checksum")
    fields = dict(value["identity"])
    if fields["codec"] != CODEC_VERSION:
        raise InputError(f"codec {fields['codec']}, this program reads {CODEC_VERSION}")
    if checksum != artifacts.fingerprint(value):
        raise InputError("was changed after it was written, its checksum does not fit")
    for kind, found in ((Identity, fields), (Manifest, value)):
        for field in dataclasses.fields(kind):
            if field.type in (int, float, str) and type(found[field.name]) is not field.type:
                raise TypeError(f"{field.name} is {found[field.name]!r}")
    identity = Identity(**fields | {"scheme": scheme_from_json(fields["scheme"])})
    return Manifest(**value | {"identity": identity, "files": dict(value["files"])})


def teacher_fingerprint(model: models.Model) -> str:
    """Sixteen hex digits over the shape and every parameter, name, dtype and bytes.

    With several processes all must call it.
    """
    digest = hashlib.sha256(artifacts.fingerprint(dataclasses.asdict(model.config)).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        # In slices, so that the host never holds a whole stacked parameter of a large model.
        step = max(1, _SLICE_BYTES * len(leaf) // leaf.nbytes)
        for start in range(0, len(leaf), step):
            part = leaf[start : start + step]
            if isinstance(part, jax.Array) and not part.is_fully_addressable:
                part = multihost_utils.process_allgather(part, tiled=True)
            digest.update(np.asarray(part).tobytes())
    return digest.hexdigest()[:16]
