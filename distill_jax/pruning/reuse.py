"""Scores that were measured before: taken where they fit, refused where they mislead."""

import dataclasses
import os
from collections.abc import Sequence

import jax
from etils import epath

from distill_jax import models, parallel
from distill_jax.artifacts import InputError
from distill_jax.pruning.activations import Batch
from distill_jax.pruning.calibration import removal_losses, rows_fingerprint
from distill_jax.pruning.importance import ImportanceConfig, importance, model_fingerprint
from distill_jax.pruning.scores import Scores


def find_or_measure(
    path: str | os.PathLike[str],
    model: models.Model,
    rows: Sequence[Batch],
    config: ImportanceConfig,
    *,
    removal_rows: Sequence[Batch] = (),
    tokenizer: str = "",
    batch_sharding: jax.sharding.Sharding | None = None,
) -> Scores:
    """The scores in a file if they are those wanted; else they are measured, and saved there.

    Scores of other rows or by another method are replaced, since they can be measured again.

    Args:
      path: the file; it need not be there.
      model: the model to score.
      rows: calibration batches.
      config: method and aggregations.
      removal_rows: batches on which `removal_losses` is measured, too; none for not at all.
      tokenizer: fingerprint of the tokenizer that made the rows; empty if it is not known.
      batch_sharding: where a batch is put; None leaves that to JAX.

    Raises:
      InputError: the file's scores are of another model, or of rows by another tokenizer, or it is
        no scores file; and what `importance` raises.
    """
    place, shown = os.fspath(path), model_fingerprint(model)
    # One process decides: what follows is work for all or for none.
    there = parallel.on_main(lambda: epath.Path(place).exists(), what=place)
    found = Scores.load(place) if there else None
    if found and found.model != shown:
        raise InputError(
            f"{place}: scores of model {found.model}, but the model to prune is {shown}; "
            "remove them, or use another directory"
        )
    if found and found.tokenizer and tokenizer and found.tokenizer != tokenizer:
        raise InputError(
            f"{place}: scores of rows by tokenizer {found.tokenizer}, but the calibration rows are "
            f"by {tokenizer}; remove them, or use another directory"
        )
    size = model.config.vocab_size
    wanted = config.describe(), rows_fingerprint(rows, size) if config.reads_rows else ""
    if found is None or (found.method, found.rows) != wanted:
        new = importance(model, rows, config, batch_sharding=batch_sharding)
        new = dataclasses.replace(new, tokenizer=tokenizer)
        if found is not None:
            new = dataclasses.replace(new, removal=found.removal, removal_rows=found.removal_rows)
        found = new
        _save(found, place)
    if removal_rows:
        measured_on = rows_fingerprint(removal_rows, size)
        if found.removal is None or found.removal_rows != measured_on:
            removal = removal_losses(model, removal_rows, batch_sharding=batch_sharding)
            found = dataclasses.replace(found, removal=removal, removal_rows=measured_on)
            _save(found, place)
    return found


def _save(scores: Scores, place: str) -> None:
    parallel.on_main(lambda: scores.save(place), what=place)
