"""How good models are on held-out text, and how close they are to their teachers.

Dimensions: B batch, T time, P devices that share a row, S time steps of each in a chunk, D embed,
V vocab.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from distill_jax import data, losses, parallel, progress
from distill_jax.artifacts import InputError
from distill_jax.evaluation.speed import SpeedConfig, measure_speed
from distill_jax.models import (
    LlamaConfig,
    Model,
    Params,
    Reading,
    hidden_states,
    logical_axes,
    unembedding,
)
from distill_jax.models.times import Times

CALIBRATION_BINS = 15
"""Equal-width bins of the top-1 confidence in the calibration error (Guo et al. 2017)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How models are evaluated; no choice here changes a figure but the measured speeds.

    Attributes:
      batch_rows: rows in a forward pass, also where a prune or a search reads them; more, if that
        is not a multiple of the devices that share them.
      chunk_tokens: tokens whose logits exist at one time, for every teacher and one model.
      speed: how tokens/s are measured; None leaves them out.
    """

    batch_rows: int = 8
    chunk_tokens: int = 512
    speed: SpeedConfig | None = dataclasses.field(default_factory=SpeedConfig)

    def __post_init__(self) -> None:
        for name in ("batch_rows", "chunk_tokens"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"EvaluationConfig.{name} is {getattr(self, name)}; it must be positive"
                )


Sums = tuple[losses.Totals, Array]
"""Sums over tokens, and over the tokens of each calibration bin of (confidence - correct)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prediction:
    """What one model says about the next token, at each position of a chunk.

    Attributes:
      log_probs_BPSV: log-probabilities, float32.
      top1_BPS: the likeliest token.
    """

    log_probs_BPSV: Array
    top1_BPS: Array


def evaluate(
    models: Mapping[str, Model],
    teachers: Sequence[str],
    splits: Mapping[str, data.RowSource],
    config: EvaluationConfig = EvaluationConfig(),
    *,
    mesh: Mesh | None = None,
) -> dict[str, dict[str, Any]]:
    """Figures of every model on every split.

    One pass over the rows serves all models: a teacher's logits are computed once per chunk of
    tokens and every model is compared with them there, so memory holds `chunk_tokens` rows of
    logits per teacher and for one model more. Every figure is a sum over the unmasked tokens of the
    split, divided once by their number: batches, chunks, padding and devices do not matter.

    Args:
      models: what to evaluate, the teachers included.
      teachers: names in `models` that every model is compared with; may be empty.
      splits: rows by split: random access to records with "tokens" and "segment_ids" [T], and
        optionally "labels" and "where" [T] in place of those of next-token prediction.
      config: sizes of the work.
      mesh: spreads parameters and rows, along its axis "sequence" the times of rows if they fall
        apart; None leaves the parameters where they are.

    Returns:
      By model, a JSON object with "parameters", "non_embedding_parameters", "flops_per_token"
      (forward, at the rows' length), the speeds of `measure_speed`, and for each split an object
      with "tokens", "cross_entropy" in nats, "perplexity", "top1_accuracy", "calibration_error"
      (expected, 15 bins of the top-1 confidence), and "kl" and "agreement" by teacher:
      KL(teacher || model) in nats and how often both prefer the same token.

    Raises:
      InputError: a teacher is not among the models, vocabularies differ, or a split has no row or
        no token to predict.
    """
    _check(models, teachers, splits)
    if mesh is not None:
        models = {name: _place(model, mesh) for name, model in models.items()}
    results = _sizes_and_speeds(models, splits, config)
    all_rows = sum(len(records) for records in splits.values())
    with progress.bar("evaluate", all_rows, unit="rows") as bar:
        for split, records in splits.items():
            total: dict[str, Sums] = {}
            for rows, batch in _batches(records, config.batch_rows, mesh):
                compared = _compare_batch(models, teachers, batch, config.chunk_tokens, mesh)
                for name, sums in compared:
                    total[name] = _add(total[name], sums) if name in total else sums
                bar.advance(rows, tokens=rows * batch["tokens"].shape[1], note=split)
            for name in models:
                if not total[name][0].weight:
                    raise InputError(f"split {split!r} has no token to predict")
                results[name][split] = _figures(*total[name], teachers)
    return results


def _check(models: Mapping[str, Model], teachers: Sequence[str], splits: Mapping[str, Any]) -> None:
    for name in teachers:
        if name not in models:
            raise InputError(f"teacher {name!r} is not among the models: {', '.join(models)}")
        for other, model in models.items():
            sizes = models[name].config.vocab_size, model.config.vocab_size
            if sizes[0] != sizes[1]:
                raise InputError(
                    f"teacher {name!r} has a vocabulary of {sizes[0]}, {other!r} of {sizes[1]}"
                )
    for split, records in splits.items():
        if not len(records):
            raise InputError(f"split {split!r} has no rows to evaluate on")


def _place(model: Model, mesh: Mesh) -> Model:
    places = parallel.shardings(mesh, logical_axes(model.config), model.params)
    return dataclasses.replace(model, params=jax.device_put(model.params, places))


def _sizes_and_speeds(
    models: Mapping[str, Model], splits: Mapping[str, data.RowSource], config: EvaluationConfig
) -> dict[str, dict[str, Any]]:
    """Figures that depend on a model's shape alone; each shape is timed once."""
    length = max((len(records[0]["tokens"]) for records in splits.values()), default=1)
    speeds: dict[LlamaConfig, dict[str, float]] = {}
    results: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        shape = model.config
        if config.speed is not None and shape not in speeds:
            speeds[shape] = measure_speed(model, config.speed)
        results[name] = {
            "parameters": shape.parameters,
            "non_embedding_parameters": shape.non_embedding_parameters,
            "flops_per_token": shape.flops_per_token(length),
            **speeds.get(shape, {}),
        }
    return results


def _batches(
    records: data.RowSource, batch_rows: int, mesh: Mesh | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """All rows in order: how many, and their batch, filled up with rows that predict nothing.

    With a mesh a batch is as many rows as its devices share evenly. Labels and mask are
    [B, P, T/P], as the times of rows lie.
    """
    times = _times(mesh, len(records[0]["tokens"]))
    full = parallel.whole_batch(batch_rows, mesh, split_time=times is not None)
    for start in range(0, len(records), full):
        rows = [records[i] for i in range(start, min(start + full, len(records)))]
        fields = [_with_labels(row) for row in rows]
        batch = {name: np.stack([row[name] for row in fields]) for name in fields[0]}
        missing = full - len(rows)
        batch = {name: np.pad(array, ((0, missing), (0, 0))) for name, array in batch.items()}
        for name in ("labels", "where"):
            ordered = batch[name][:, times.order(batch[name].shape[1])] if times else batch[name]
            batch[name] = ordered.reshape(full, times.shards if times else 1, -1)
        if mesh is not None:
            places = parallel.batch_sharding(mesh, split_time=times is not None)
            batch = jax.device_put(batch, places)
        yield len(rows), batch


def _times(mesh: Mesh | None, length: int) -> Times | None:
    """How devices share rows of that length; None: each has rows of its own."""
    shards = 1 if mesh is None else parallel.time_shards(mesh)
    return Times(parallel.TIME_AXIS, shards) if shards > 1 and length % (2 * shards) == 0 else None


def _with_labels(row: Mapping[str, Any]) -> dict[str, np.ndarray]:
    tokens, segment_ids = np.asarray(row["tokens"]), np.asarray(row["segment_ids"])
    if "labels" in row:
        labels, where = row["labels"], row["where"]
    else:
        labels, where = data.next_token_labels(tokens, segment_ids)
    return {"tokens": tokens, "segment_ids": segment_ids, "labels": labels, "where": where}


def _compare_batch(
    models: Mapping[str, Model],
    teachers: Sequence[str],
    batch: dict[str, Any],
    chunk_tokens: int,
    mesh: Mesh | None,
) -> Iterator[tuple[str, Sums]]:
    """Every model's sums over every chunk of one batch, in float64 on the host."""
    hidden = {
        name: forward(model.config, model.params, batch["tokens"], batch["segment_ids"], mesh)
        for name, model in models.items()
    }
    rows, shards, length = batch["labels"].shape
    steps = max(chunk_tokens // (rows * shards), 1)
    for start in range(0, length, steps):
        chunk = np.s_[:, :, start : start + steps]
        labels, where = batch["labels"][chunk], batch["where"][chunk]
        taught = {name: _predict(models[name].params, hidden[name][chunk]) for name in teachers}
        for name, model in models.items():
            prediction = taught.get(name) or _predict(model.params, hidden[name][chunk])
            sums = _compare(prediction, taught, labels, where)
            # Fetching waits for the chunk, so that no queue of logits fills the memory.
            yield name, jax.tree.map(lambda x: x.astype(np.float64), parallel.to_host(sums))


@functools.partial(jax.jit, static_argnums=(0, 4))
def forward(
    config: LlamaConfig,
    params: Params,
    tokens_BT: Array,
    segment_ids_BT: Array,
    mesh: Mesh | None = None,
) -> Array:
    """`models.hidden_states` [B, P, T/P, D], compiled once for each shape.

    On a mesh every device works on rows of its own, or on its part of the times of rows that P
    devices share; the order is that of `Times.order`.
    """
    run: Any = functools.partial(hidden_states, config)
    times = _times(mesh, tokens_BT.shape[1])
    if mesh is not None and parallel.row_shards(mesh) > 1:
        shares = parallel.Shares(mesh, logical_axes(config), params)
        run = functools.partial(run, reading=Reading.of(shares), times=times)
        split_time = times is not None
        out = PartitionSpec(parallel.row_axes(mesh, split_time=split_time), times and times.axis)
        run = parallel.map_rows(run, shares, split_time=split_time, out=out)
    hidden_BTD = run(params, tokens_BT, segment_ids_BT)
    rows, time, embed = hidden_BTD.shape
    shards = times.shards if times else 1
    return hidden_BTD.reshape(rows, shards, time // shards, embed)


@jax.jit
def _predict(params: Params, hidden_BPSD: Array) -> Prediction:
    logits = jnp.einsum(
        "BPSD,DV->BPSV", hidden_BPSD, unembedding(params), preferred_element_type=jnp.float32
    )
    return Prediction(jax.nn.log_softmax(logits), jnp.argmax(logits, axis=-1))


@jax.jit
def _compare(
    model: Prediction, teachers: dict[str, Prediction], labels_BPS: Array, where_BPS: Array
) -> Sums:
    """Sums over a chunk of one model's figures."""
    log_probs = model.log_probs_BPSV
    cross_entropy = -jnp.take_along_axis(log_probs, labels_BPS[..., None], axis=-1)[..., 0]
    correct = (model.top1_BPS == labels_BPS).astype(jnp.float32)
    terms = {"top1_accuracy": correct}
    for name, teacher in teachers.items():
        taught = teacher.log_probs_BPSV
        terms[f"kl/{name}"] = (jnp.exp(taught) * (taught - log_probs)).sum(axis=-1)
        terms[f"agreement/{name}"] = (model.top1_BPS == teacher.top1_BPS).astype(jnp.float32)
    confidence = jnp.exp(log_probs.max(axis=-1))
    bins = jnp.minimum((confidence * CALIBRATION_BINS).astype(jnp.int32), CALIBRATION_BINS - 1)
    excess = jnp.where(where_BPS, confidence - correct, 0.0)
    per_bin = jnp.zeros(CALIBRATION_BINS).at[bins].add(excess)
    flat = {name: term.reshape(-1) for name, term in terms.items()}
    return losses.reduce(cross_entropy.reshape(-1), flat, where_BPS.reshape(-1)), per_bin


def _add(left: Sums, right: Sums) -> Sums:
    return jax.tree.map(np.add, left, right)


def _figures(totals: losses.Totals, excess_per_bin: Any, teachers: Sequence[str]) -> dict[str, Any]:
    """The one division by the number of tokens."""
    means = {name: float(total / totals.weight) for name, total in totals.terms.items()}
    cross_entropy = float(totals.loss / totals.weight)
    return {
        "tokens": int(totals.weight),
        "cross_entropy": cross_entropy,
        "perplexity": float(np.exp(cross_entropy)),
        "top1_accuracy": means["top1_accuracy"],
        "calibration_error": float(np.abs(excess_per_bin).sum() / totals.weight),
        "kl": {name: means[f"kl/{name}"] for name in teachers},
        "agreement": {name: means[f"agreement/{name}"] for name in teachers},
    }
