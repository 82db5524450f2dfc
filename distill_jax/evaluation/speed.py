"""How many tokens a second a model reads and writes on this machine."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from distill_jax import models
from distill_jax.artifacts import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """How tokens/s are measured: the median of a few timed repetitions after a warm-up.

    Attributes:
      prefill_tokens: length of the prompt that is read.
      new_tokens: tokens that are generated.
      rows: prompts at one time; 1 is what a single user feels.
      repeats: timed repetitions.
    """

    prefill_tokens: int = 256
    new_tokens: int = 32
    rows: int = 1
    repeats: int = 3

    def __post_init__(self) -> None:
        for name in ("prefill_tokens", "new_tokens", "rows", "repeats"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"SpeedConfig.{name} is {getattr(self, name)}; it must be positive"
                )


def measure_speed(model: models.Model, config: SpeedConfig = SpeedConfig()) -> dict[str, float]:
    """Measured "prefill_tokens_per_s" and "generation_tokens_per_s" of one model.

    Prefill reads a prompt and gives the logits that follow it. Generation is greedy, from a prompt
    of one token, so that nearly all of its time goes into new tokens; compilation is not counted.
    """
    tokens = np.arange(config.rows * config.prefill_tokens) % model.config.vocab_size
    tokens_BT = jnp.asarray(tokens.reshape(config.rows, -1), jnp.int32)

    def prefill() -> Any:
        return _prefill(model.config, model.params, tokens_BT)

    def generate() -> Any:
        return models.generate(
            model,
            [[1]] * config.rows,
            max_new_tokens=config.new_tokens,
            sampling=models.Sampling(temperature=0.0),
            seeds=list(range(config.rows)),
        )

    return {
        "prefill_tokens_per_s": tokens.size / _median_seconds(prefill, config.repeats),
        "generation_tokens_per_s": config.rows
        * config.new_tokens
        / _median_seconds(generate, config.repeats),
    }


@functools.partial(jax.jit, static_argnums=0)
def _prefill(config: models.LlamaConfig, params: models.Params, tokens_BT: Array) -> Array:
    last_BD = models.hidden_states(config, params, tokens_BT)[:, -1]
    return last_BD @ models.unembedding(params)


def _median_seconds(work: Callable[[], Any], repeats: int) -> float:
    jax.block_until_ready(work())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(work())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
