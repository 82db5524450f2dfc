"""Several models of one shape made one, by the mean of their parameters.

Llama 3 (Dubey et al. 2024, section 4.1.5) averages what runs on other data, or with other
hyperparameters, left at each stage of post-training; Wortsman et al. (2022) call it a model soup.
"""

import functools
import math
import os
from collections.abc import Sequence
from typing import Any

import jax

from distill_jax.artifacts import InputError, diff
from distill_jax.models.checkpoint import load, load_config
from distill_jax.models.llama import Model, Params


def average(
    paths: Sequence[str | os.PathLike[str]],
    *,
    weights: Sequence[float] | None = None,
    shardings: Any | None = None,
) -> Model:
    """The weighted mean of the parameters of models that started from the same one.

    At most two models are in memory at a time.

    Args:
      paths: what `load` takes, such as the directories that a stage left in several runs.
      weights: one for each, of any sum; None: all weigh the same.
      shardings: as in `load`.

    Returns:
      The model, in float32.

    Raises:
      InputError: there is no model, one has another shape than the first, or the weights are not
        as many numbers of a sum above 0.
    """
    shares = [1.0] * len(paths) if weights is None else list(weights)
    if not paths:
        raise InputError("average: no models")
    if len(shares) != len(paths):
        raise InputError(f"average: {len(paths)} models and {len(shares)} weights")
    total = math.fsum(shares)
    if not (all(map(math.isfinite, shares)) and total > 0):
        raise InputError(f"average: weights {shares} are not numbers with a sum above 0")
    config = load_config(paths[0])
    for path in paths[1:]:
        if differences := diff(config.to_json(), load_config(path).to_json()):
            raise InputError(f"{path}: another shape than {paths[0]}: {', '.join(differences)}")
    mean: Params | None = None
    for path, share in zip(paths, shares):
        params = load(path, shardings=shardings).params
        mean = _scaled(params, share / total) if mean is None else _add(mean, params, share / total)
    assert mean is not None  # there is a path
    return Model(config, mean)


@functools.partial(jax.jit, donate_argnums=0)
def _scaled(params: Params, share: float) -> Params:
    return jax.tree.map(lambda leaf: share * leaf, params)


@functools.partial(jax.jit, donate_argnums=0)
def _add(mean: Params, params: Params, share: float) -> Params:
    return jax.tree.map(lambda one, other: one + share * other, mean, params)
