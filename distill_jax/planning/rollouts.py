"""The programs that write the answers of on-policy distillation, and rows that learn from them."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from distill_jax import models, parallel, posttraining
from distill_jax.models import batching, decoding
from distill_jax.planning.program import Choice, Program, described
from distill_jax.planning.shapes import placed_params
from distill_jax.posttraining.rollouts import score_rows
from distill_jax.posttraining.rows import ROW, to_record
from distill_jax.training import TrainConfig

_LONGEST = "prompts and answers are as long as sequence_length and max_new_tokens let them be"


@dataclasses.dataclass(frozen=True)
class Writing:
    """How a round's answers are written.

    Attributes:
      student: shape of the model that writes.
      teacher: shape of the one that it learns from.
      config: what is drawn.
      train: how the run goes, as the recipe says.
      choice: what is decided otherwise.
      mesh: where.
      waiting: by name what devices hold meanwhile.
      notes: what was assumed.
    """

    student: models.LlamaConfig
    teacher: models.LlamaConfig
    config: posttraining.OnPolicyConfig
    train: TrainConfig
    choice: Choice
    mesh: Mesh
    waiting: dict[str, Any]
    notes: tuple[str, ...]

    def programs(self) -> list[Program]:
        """In the order in which they run; none where the student never writes."""
        if self.config.given_share == 1:
            return []
        sizes = batching.cache_slots(self._prompt, self.config.max_new_tokens)
        found = [self._arrange(), self._read(), *map(self._write, sizes)]
        if self.config.method == "minillm":
            found += [self._score("student", self._models[0]), self._score("teacher", self._taught)]
        return found

    @functools.cached_property
    def _taught(self) -> models.Model:
        params = placed_params(self.teacher, self.mesh, self.train.compute_dtype)
        return models.Model(self.teacher, params)

    @functools.cached_property
    def _models(self) -> tuple[models.Model, ...]:
        """Those that write, in the type of the computation."""
        params = placed_params(self.student, self.mesh, self.train.compute_dtype)
        student = models.Model(self.student, params)
        return (student, self._taught) if self.config.mixed else (student,)

    @functools.cached_property
    def _params(self) -> tuple[models.Params, ...]:
        return tuple(one.params for one in self._models)

    @functools.cached_property
    def _setup(self) -> decoding.Setup:
        config, rows = self.config, parallel.batch_sharding(self.mesh)
        return batching.make_setup(self._models, config.sampling, config.teacher_share, rows)

    @property
    def _prompt(self) -> int:
        return self.config.sequence_length - self.config.max_new_tokens

    @property
    def _round(self) -> int:
        """Answers of a round."""
        return self.config.rollout_rows or self.train.batch_rows

    @functools.cached_property
    def _rows(self) -> int:
        """That are written at the same time."""
        if self.choice.batch is not None:
            return self.choice.batch * parallel.row_shards(self.mesh)
        return batching.row_count(self._round, self.config.rows_at_once, self._setup.rows)

    @property
    def _answers(self) -> float:
        """Of the whole stage."""
        rounds = self.train.steps * self.train.batch_rows / (self.config.epochs * self._round)
        return rounds * self._round * (1 - self.config.given_share)

    @functools.cached_property
    def _weights(self) -> Any:
        shapes = jax.eval_shape(functools.partial(decoding.arrange, self._setup), self._params)
        return _placed(shapes, self._setup.weights)

    def _cache(self, slots: int) -> decoding.Rows:
        make = functools.partial(decoding.empty, self._setup, rows=self._rows, slots=slots)
        shapes = jax.eval_shape(make, self._params)
        vectors = shapes._replace(caches=())
        places = jax.tree.map(lambda _: self._setup.rows, vectors)
        layers = zip(shapes.caches, self._setup.caches)
        caches = tuple(_placed(one, jax.tree.map(lambda _, p=p: p, one)) for one, p in layers)
        return _placed(vectors, places)._replace(caches=caches)

    def _program(self, name: str, **known: Any) -> Program:
        rows = known.pop("rows", self._rows)
        apart = () if self.config.mixed else self._taught.params
        held = {"parameters": self._params, "teacher": apart, **known.pop("held", {})}
        return Program(
            name=f"on-policy {name}",
            held=held | self.waiting,
            mesh=self.mesh,
            rows=rows,
            batch=rows // parallel.row_shards(self.mesh),
            notes=(*self.notes, _LONGEST, *known.pop("notes", ())),
            **known,
        )

    def _arrange(self) -> Program:
        setup, params = self._setup, self._params
        return self._program(
            "layout",
            lower=lambda: decoding.arrange.lower(setup, params),
            held={"weights": self._weights},
            tokens=0,
            flops=0.0,
            notes=("it moves memory, and what it computes is not counted",),
        )

    def _read(self) -> Program:
        setup, params, prompt = self._setup, self._params, self._prompt
        slots = batching.prompt_slots(prompt)
        count = batching.read_at_once(self._rows, [prompt] * self._round, setup.rows)
        tokens = described(np.zeros(slots, np.int32), count, setup.rows)
        lengths = described(np.int32(0), count, setup.rows)
        (size, *_) = batching.cache_slots(prompt, self.config.max_new_tokens)
        flops = sum(
            count * (prompt * _without_head(one, prompt) + 2.0 * one.embed * one.vocab_size)
            for one in setup.configs
        )
        return self._program(
            f"read {slots}",
            lower=lambda: decoding.read.lower(setup, params, tokens, lengths),
            held={"weights": self._weights, "cache": self._cache(size), "batch": tokens},
            rows=count,
            tokens=count * prompt,
            flops=flops,
            total_tokens=self._answers * prompt,
        )

    def _write(self, slots: int) -> Program:
        setup, weights, rows = self._setup, self._weights, self._cache(slots)
        stops = np.zeros(2, np.int32)
        # On average a token sees the prompt and half of the answer, twice what a causal row has.
        seen = 2 * self._prompt + self.config.max_new_tokens
        flops = sum(one.flops_per_token(seen) for one in setup.configs) * self._rows
        return self._program(
            f"write {slots}",
            lower=lambda: decoding.extend.lower(setup, weights, rows, 0, stops, 1, 1, 1),
            held={"weights": weights, "cache": rows},
            tokens=self._rows,
            flops=flops,
            total_tokens=self._answers * self.config.max_new_tokens,
            turns=1,
            notes=("a step is one token of every row; rows that have ended count, too",),
        )

    def _score(self, name: str, model: models.Model) -> Program:
        shards, sharding = parallel.row_shards(self.mesh), parallel.batch_sharding(self.mesh)
        length = self.config.sequence_length
        most = self.config.rows_at_once if self.choice.batch is None else self._rows
        count = -(-min(most, self._round) // shards) * shards
        record = to_record([], length)
        arrays = tuple(described(record[one], count, sharding) for one in ROW)
        return self._program(
            f"score by the {name}",
            lower=lambda: score_rows.lower(model.config, model.params, arrays, self.mesh),
            held={"batch": arrays},
            rows=count,
            tokens=count * length,
            flops=model.config.flops_per_token(length) * count * length,
            total_tokens=self._answers * length,
        )


def on_policy_record(config: posttraining.OnPolicyConfig, text_length: int) -> dict[str, Any]:
    """A row of the batches of `posttraining.Rollouts`, but for its values.

    Args:
      config: what is learnt.
      text_length: tokens of a row of the corpus.
    """
    length = config.sequence_length
    record: dict[str, Any] = to_record([], length)
    if config.method == "minillm":
        names = ("old_log_probs", "weights", "advantages")
        record["targets"] = {name: np.zeros(length, np.float32) for name in names}
    lengths = {posttraining.CONVERSATIONS: length, posttraining.TEXT: text_length}
    for name in config.beside:
        row = to_record([], lengths[name])
        record[name] = row | {"where": row["where"].astype(np.float32)}
    return record


def _without_head(config: models.LlamaConfig, context: int) -> float:
    """FLOPs of a token of which no logits are made."""
    return config.flops_per_token(context) - 2.0 * config.embed * config.vocab_size


def _placed(shapes: Any, places: Any) -> Any:
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )
