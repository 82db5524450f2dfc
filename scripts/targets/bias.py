"""Whether samples are right on average: redraws, compared with the whole distribution."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from calibration import encode
from distributions import BATCH, Batch
from errors import Entry

from distill_jax import teachers
from distill_jax.teachers import sampling, vocabulary

REDRAWS = 200
RANKS = (1, 3, 10, 100, 1000)


def bias(entries: list[Entry], batch: Batch, tokens: int, seed: int) -> dict[str, float]:
    """The largest |z| of every unbiased entry, by its label."""
    teacher_NV, student_NV, labels_N = (np.asarray(x[:tokens]) for x in batch)
    functionals = _functionals(teacher_NV, student_NV)
    exact = scipy.special.softmax(teacher_NV.astype(np.float64), axis=-1)
    expected = np.array([(values * exact).sum() for values in functionals])
    together = BATCH // tokens
    repeated_NV, repeated_N = jnp.tile(teacher_NV, (together, 1)), np.tile(labels_N, together)
    found = {}
    for entry in entries:
        if isinstance(entry.scheme, teachers.TopK):
            continue
        said = np.zeros((REDRAWS, len(functionals)))
        for start in range(0, REDRAWS, together):
            seeds = jnp.array([[seed, start + n] for n in range(together)], jnp.uint32)
            keys_N = jax.vmap(sampling.token_keys, (0, None))(seeds, jnp.arange(tokens)).ravel()
            (encoded,) = encode((entry.scheme,), repeated_NV, repeated_N, keys_N)
            arrays = entry.scheme.unpack(encoded)
            for place, values in enumerate(functionals):
                picked = values[np.arange(BATCH)[:, None] % tokens, arrays["ids"]]
                sums = (arrays["weights"] * picked).reshape(together, -1).sum(-1)
                said[start : start + together, place] = sums
        # What is kept exactly has no deviation but float32's.
        deviation = np.maximum(said.std(axis=0, ddof=1), 1e-6 * tokens) / math.sqrt(REDRAWS)
        found[entry.label] = float(np.abs((said.mean(axis=0) - expected) / deviation).max())
    return found


def _functionals(teacher_NV: np.ndarray, student_NV: np.ndarray) -> list[np.ndarray]:
    """Values [N, V] whose sum, weighted by what is kept, should be that weighted by p."""
    rank_NV = np.argsort(np.argsort(-teacher_NV, axis=-1), axis=-1)
    kind_NV = np.searchsorted(RANKS, rank_NV, side="right")
    made = [(kind_NV == kind).astype(np.float32) for kind in range(len(RANKS) + 1)]
    even_V = np.arange(teacher_NV.shape[1]) % 2 == 0
    made.append(np.broadcast_to(even_V.astype(np.float32), teacher_NV.shape))
    return [*made, -np.asarray(vocabulary.log_softmax(jnp.asarray(student_NV)))]
