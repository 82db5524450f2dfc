"""Teachers' distributions on disk: sampled, encoded, written once, and read back by content."""

from distill_jax.teachers.inspect import describe, describe_row, show
from distill_jax.teachers.join import JoinedSource, join
from distill_jax.teachers.manifest import (
    MANIFEST,
    Identity,
    Manifest,
    read_manifest,
    teacher_fingerprint,
)
from distill_jax.teachers.rows import Corpus
from distill_jax.teachers.schemes import (
    SCHEMES,
    RandomSampling,
    Scheme,
    Threshold,
    TopK,
    blank_row,
    scheme_from_json,
    scheme_to_json,
    to_targets,
)
from distill_jax.teachers.store import Store, open_store
from distill_jax.teachers.verify import verify
from distill_jax.teachers.vocabulary import threshold_for
from distill_jax.teachers.writer import WriteConfig, asking_of, write_stores

__all__ = [
    "MANIFEST",
    "SCHEMES",
    "Corpus",
    "Identity",
    "JoinedSource",
    "Manifest",
    "RandomSampling",
    "Scheme",
    "Store",
    "Threshold",
    "TopK",
    "WriteConfig",
    "asking_of",
    "blank_row",
    "describe",
    "describe_row",
    "join",
    "open_store",
    "read_manifest",
    "scheme_from_json",
    "scheme_to_json",
    "show",
    "teacher_fingerprint",
    "threshold_for",
    "to_targets",
    "verify",
    "write_stores",
]
