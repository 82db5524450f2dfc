"""Batches of what the model itself writes while it is trained.

A round is a few answers that are drawn with the parameters as they are when it begins, and the
steps that learn from them. What is drawn is a function of these parameters, the seed and the
round's number, and nothing else; a checkpoint in the middle of a round holds the round's answers,
so that any step may be the last one before a kill.

Dimensions: R rows of a round, B of a batch, T tokens of a row.
"""

import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import Array
from jax.sharding import Mesh

from distill_jax import artifacts, data, losses, parallel
from distill_jax.artifacts import InputError
from distill_jax.models import LlamaConfig, Model, Params, Reading, generate, logical_axes
from distill_jax.posttraining.answers import seed_of, stop_ids
from distill_jax.posttraining.chat import Example
from distill_jax.posttraining.log_probs import row_log_probs
from distill_jax.posttraining.on_policy import CONVERSATIONS, TEXT, OnPolicyConfig
from distill_jax.posttraining.rows import ROW, Record, filled_batches, to_record
from distill_jax.training import TrainConfig

SAMPLES_FILE = "samples.jsonl"
"""The answers of the last round that had any."""
_STUDENT, _TEACHER = "student", "teacher"


class _Round(NamedTuple):
    """A round that has begun.

    Attributes:
      number: counts from 0.
      samples: what was drawn, as JSON: "answers", token ids, and if they are needed "student" and
        "teacher", log-probabilities of all of these tokens; None if the rows are given ones.
      rows: arrays [R, ...] of its rows.
      figures: what of it joins the metrics.
    """

    number: int
    samples: dict[str, Any] | None
    rows: dict[str, Any]
    figures: dict[str, float]


class Rollouts(Iterator[dict[str, Any]]):
    """The batches of `training.train` for `on_policy_loss`; its `before_batch` is `draw`.

    A batch is this process's share. It has the arrays of `pack`; for MiniLLM "targets", arrays
    [B, T] that `losses.minillm` reads; and, by the names in `OnPolicyConfig.beside`, rows of others
    whose "where" is a weight, the round's tokens in the batch over theirs.
    """

    def __init__(
        self,
        model: LlamaConfig,
        teacher: Model,
        tokenizer: data.Tokenizer,
        config: OnPolicyConfig,
        train: TrainConfig,
        prompts: Sequence[Sequence[int]],
        *,
        conversations: Sequence[Example] = (),
        text: data.RowSource | None = None,
        mesh: Mesh | None = None,
        directory: str | os.PathLike[str] | None = None,
    ):
        """Checks that all is there; nothing is drawn.

        Args:
          model: the student's shape.
          teacher: what the student learns from.
          tokenizer: of both.
          config: what is drawn.
          train: how the run goes; its seed orders prompts, conversations and text.
          prompts: in tokens.
          conversations: given ones, where the config uses them.
          text: the corpus, where the config uses it.
          mesh: devices of the run; None takes all of them, as one FSDP group.
          directory: where the answers of the last round are shown, in `SAMPLES_FILE`.

        Raises:
          InputError: no prompts, conversations or text where they are used, or one too long;
            `rollout_rows` that is no multiple of a batch's rows.
        """
        self._size = train.batch_rows if config.rollout_rows is None else config.rollout_rows
        _check(config, train, self._size, prompts, conversations, text)
        self._shape, self._tokenizer, self._config, self._train = model, tokenizer, config, train
        self._mesh = mesh or parallel.make_mesh()
        self._share = parallel.row_share(parallel.batch_sharding(self._mesh, split_time=True))
        places = parallel.shardings(self._mesh, logical_axes(teacher.config), teacher.params)
        self._teacher = Model(teacher.config, jax.device_put(teacher.params, places))
        self._stops = stop_ids(tokenizer, config.template)
        self._directory = None if directory is None else epath.Path(directory)
        self._sources: dict[str, Any] = {"prompts": prompts, "given": conversations}
        self._sources |= {CONVERSATIONS: conversations, TEXT: text}
        self._step = 0
        self._round: _Round | None = None

    @property
    def _steps(self) -> int:
        """Of a round."""
        return self._config.epochs * self._size // self._train.batch_rows

    def draw(self, params: Params, step: int) -> dict[str, float]:
        """Begins the step's round, if it has not begun; returns the round's figures.

        These are "student_sampled", whether the model wrote the answers; "answer_length", tokens
        that are learnt of a row, on average; and for MiniLLM "reward", the mean over tokens of
        log p(teacher) - log q(student) as they were drawn.
        """
        self._step = step
        number = (step - 1) // self._steps
        if self._round is None or self._round.number != number:
            own = seed_of(self._config.seed, "kind", number) >= self._config.given_share * 2**31
            samples = self._draw(params, number) if own else None
            self._round = self._begin(number, samples)
        return self._round.figures

    def __next__(self) -> dict[str, Any]:
        """The batch of the step that `draw` was called for."""
        assert self._round is not None  # `draw` comes first
        size = self._train.batch_rows
        epoch, part = divmod((self._step - 1) % self._steps, self._size // size)
        source = np.random.default_rng((self._train.seed, self._round.number, epoch))
        chosen = source.permutation(self._size)[part * size : (part + 1) * size]
        batch = jax.tree.map(lambda array: array[chosen], self._round.rows)
        for name in self._config.beside:
            others = _stack(self._records(name, (self._step - 1) * size, size))
            # Rows may have nothing to learn.
            ratio = np.float32(batch["where"].sum() / max(others["where"].sum(), 1))
            batch[name] = {**others, "where": others["where"] * ratio}
        return jax.tree.map(lambda array: array[self._share.index :: self._share.count], batch)

    def get_state(self) -> dict[str, Any]:
        """JSON that `set_state` goes on from, the same on every process."""
        ended = self._step % self._steps == 0
        return {
            "step": self._step,
            "samples": None if ended or self._round is None else self._round.samples,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on after the step of `get_state`."""
        self._step, self._round = state["step"], None
        if state["samples"] is not None:
            self._round = self._begin((self._step - 1) // self._steps, state["samples"])

    def _draw(self, params: Params, number: int) -> dict[str, Any]:
        """The answers of a round, written by the model as it is now."""
        config, dtype = self._config, self._train.compute_dtype
        student = Model(self._shape, jax.tree.map(lambda leaf: leaf.astype(dtype), params))
        prompts = self._prompts(number)
        answers = generate(
            student,
            prompts,
            max_new_tokens=config.max_new_tokens,
            sampling=config.sampling,
            seeds=[seed_of(config.seed, number, row) for row in range(self._size)],
            stop_ids=self._stops,
            batch_rows=config.rows_at_once,
            sharding=parallel.batch_sharding(self._mesh),
            teacher=self._teacher if config.mixed else None,
            teacher_share=config.teacher_share,
        )
        samples: dict[str, Any] = {"answers": [list(answer.tokens) for answer in answers]}
        if config.method == "minillm":
            records = self._answered(number, samples["answers"])
            for name, one in ((_STUDENT, student), (_TEACHER, self._teacher)):
                # By the pass that trains: in a low precision the cache's would not be the same.
                samples[name] = self._score(one, records).tolist()
        self._show(number, samples)
        return samples

    def _begin(self, number: int, samples: dict[str, Any] | None) -> _Round:
        """A round with what was drawn for it; pure."""
        if samples is None:
            records = self._records("given", number * self._size, self._size)
        else:
            records = self._answered(number, samples["answers"])
        rows: dict[str, Any] = _stack(records)
        where_RT = rows["where"]
        figures = {
            "student_sampled": float(samples is not None),
            "answer_length": float(where_RT.sum() / self._size),
        }
        if samples is not None and self._config.method == "minillm":
            student_RT, teacher_RT = (
                _spread(samples[name], where_RT) for name in (_STUDENT, _TEACHER)
            )
            arrays = map(jnp.asarray, (student_RT, teacher_RT, where_RT))
            rows["targets"] = jax.tree.map(np.asarray, _targets(self._config, *arrays))
            figures["reward"] = float((teacher_RT - student_RT).sum() / where_RT.sum())
        return _Round(number, samples, rows, figures)

    def _prompts(self, number: int) -> list[Sequence[int]]:
        return self._take("prompts", number * self._size, self._size)

    def _answered(self, number: int, answers: Sequence[Sequence[int]]) -> list[Record]:
        """A round's prompts with their answers, of which every token is learnt."""
        return [
            self._record(Example([*prompt, *answer], [False] * len(prompt) + [True] * len(answer)))
            for prompt, answer in zip(self._prompts(number), answers, strict=True)
        ]

    def _records(self, name: str, first: int, count: int) -> list[Record]:
        """Rows of conversations or of text, from a number on."""
        found = self._take(name, first, count)
        return [data.to_example(one) if name == TEXT else self._record(one) for one in found]

    def _take(self, name: str, first: int, count: int) -> list[Any]:
        """What stands from a number on in a source that is gone through over and over."""
        source, seed = self._sources[name], seed_of(self._train.seed, name)
        places = (divmod(number, len(source)) for number in range(first, first + count))
        return [source[int(_order(seed, lap, len(source))[place])] for lap, place in places]

    def _record(self, example: Example) -> Record:
        length = self._config.sequence_length
        return to_record([example], length, pad_id=self._tokenizer.pad_id)

    def _score(self, model: Model, records: Sequence[Record]) -> np.ndarray:
        """log p of all tokens that are learnt, row by row."""
        shards, sharding = parallel.row_shards(self._mesh), parallel.batch_sharding(self._mesh)
        size = -(-min(self._config.rows_at_once, len(records)) // shards) * shards
        found = []
        for part, batch in filled_batches(records, size):
            arrays = jax.device_put([batch[name] for name in ROW], sharding)
            log_probs_BT = parallel.to_host(
                score_rows(model.config, model.params, tuple(arrays), self._mesh)
            )
            found.append(log_probs_BT[: len(part)][batch["where"][: len(part)]])
        return np.concatenate(found)

    def _show(self, number: int, samples: Mapping[str, Any]) -> None:
        """Leaves the round's answers for people."""
        if self._directory is None or not parallel.is_main():
            return
        lines, start = [], 0
        for prompt, answer in zip(self._prompts(number), samples["answers"], strict=True):
            said = {"prompt": prompt, "answer": answer}
            line = {
                "step": number * self._steps + 1,
                **{name: self._tokenizer.decode(list(ids)) for name, ids in said.items()},
                "tokens": len(answer),
                "finished": answer[-1] in self._stops,
            }
            for name in (_STUDENT, _TEACHER):
                if name in samples:
                    line[f"{name}_log_prob"] = sum(samples[name][start : start + len(answer)])
            start += len(answer)
            lines.append(json.dumps(line, sort_keys=True) + "\n")
        artifacts.write_bytes(self._directory / SAMPLES_FILE, "".join(lines).encode())


def _check(
    config: OnPolicyConfig,
    train: TrainConfig,
    size: int,
    prompts: Sequence[Sequence[int]],
    conversations: Sequence[Example],
    text: data.RowSource | None,
) -> None:
    if size % train.batch_rows:
        raise InputError(
            f"OnPolicyConfig.rollout_rows is {size}; it must be a multiple of a batch's rows, "
            f"{train.batch_rows}"
        )
    if not prompts and config.given_share < 1:
        raise InputError("OnPolicyConfig.prompts: there are none")
    if TEXT in config.beside and not (text is not None and len(text)):
        raise InputError("OnPolicyConfig.text_weight: there is no text to learn")
    if config.uses_conversations and not conversations:
        raise InputError("OnPolicyConfig: no conversations to learn beside the student's answers")
    longest = max(map(len, prompts), default=0) + config.max_new_tokens
    given = max((len(example.tokens) for example in conversations), default=0)
    for what, tokens in (("prompt and its answer have", longest), ("conversation has", given)):
        if tokens > config.sequence_length:
            raise InputError(
                f"OnPolicyConfig.sequence_length is {config.sequence_length}; the longest {what} "
                f"{tokens} tokens"
            )


@functools.lru_cache(maxsize=8)
def _order(seed: int, lap: int, size: int) -> np.ndarray:
    """In which order a source of that size is gone through."""
    return np.random.default_rng((seed, lap)).permutation(size)


@functools.partial(jax.jit, static_argnums=(0, 3))
def score_rows(config: LlamaConfig, params: Params, arrays: tuple[Array, ...], mesh: Mesh) -> Array:
    """`row_log_probs` of the arrays of `ROW`; every device reads its own rows."""

    def of_rows(params: Params, *arrays: Array, reading: Reading = Reading()) -> Array:
        return row_log_probs(config, params, dict(zip(ROW, arrays)), reading=reading)

    if parallel.row_shards(mesh) > 1:
        shares = parallel.Shares(mesh, logical_axes(config), params)
        reading = Reading.of(shares)
        return parallel.map_rows(functools.partial(of_rows, reading=reading), shares)(
            params, *arrays
        )
    return of_rows(params, *arrays)


def _targets(
    config: OnPolicyConfig, student_RT: Array, teacher_RT: Array, where_RT: Array
) -> dict[str, Array]:
    """What `losses.minillm` reads of a round."""
    share = config.teacher_share
    mixed_RT = losses.mix_log_probs(student_RT, teacher_RT, teacher_share=share)
    return {
        "old_log_probs": student_RT,
        "weights": losses.importance_weights(
            student_RT, mixed_RT, where_RT, whole_sequence=config.whole_weights
        ),
        "advantages": losses.minillm_advantages(
            student_RT,
            teacher_RT,
            where_RT,
            reward_clip=config.reward_clip,
            length_normalize=config.length_normalised,
            whitening=config.whitening,
        ),
    }


def _spread(values: Sequence[float], where_RT: np.ndarray) -> np.ndarray:
    """Values of the tokens that count, where they are; 0 elsewhere."""
    spread = np.zeros(where_RT.shape, np.float32)
    spread[where_RT] = values
    return spread


def _stack(records: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    return {name: np.stack([record[name] for record in records]) for name in ROW}
