"""A reward model: what it prefers it learnt from pairs (Ouyang et al. 2022; Llama 3, 4.1.2).

Its score of an answer is a linear function of the last hidden state, behind the token that ends the
answer: the logit of one token there. So the scalar head is a column of the unembedding, and a
reward model is a model like any other, to save, to split over devices and to export.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from distill_jax import losses, parallel
from distill_jax.artifacts import InputError
from distill_jax.data import Tokenizer
from distill_jax.models import LlamaConfig, Model, Reading, hidden_states
from distill_jax.models.llama import Remat
from distill_jax.posttraining.answers import seed_of
from distill_jax.posttraining.chat import end_of_turn
from distill_jax.posttraining.pairs import Pair, PairConfig, both_answers
from distill_jax.posttraining.rewards import Reward, by_model
from distill_jax.posttraining.rows import Record, filled_batches
from distill_jax.training import LossFn, loss_of_rows, values_of_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModelConfig(PairConfig):
    """Which pairs a reward model learns from, see `PairConfig`; they come from files.

    Attributes:
      held_out: the share of prompts whose pairs are not learnt but measured, in [0, 1).
    """

    ended: ClassVar[bool] = True

    held_out: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.held_out < 1:
            raise InputError(f"RewardModelConfig.held_out is {self.held_out}; it must be in [0, 1)")

    def is_held_out(self, pair: Pair) -> bool:
        """Whether the pair is not learnt: drawn by a hash of its prompt."""
        return seed_of(*pair.prompt) < self.held_out * 2**31


def reward_token(tokenizer: Tokenizer, template: str | None = None) -> int:
    """The token whose logit is the score: the one that pads, or else the one that opens texts.

    It is never the token that ends a turn, whose embedding is read where the score is made.

    Raises:
      InputError: the tokenizer has no such token.
    """
    end = end_of_turn(tokenizer, template)
    for token in (tokenizer.pad_id, tokenizer.bos_id):
        if token is not None and token != end:
            return token
    raise InputError(
        "reward model: the tokenizer has no token for its score: what ends a turn also pads, and "
        "nothing opens a text"
    )


def scores(
    config: LlamaConfig,
    params: Any,
    row: Mapping[str, Array],
    token: int,
    *,
    remat: Remat = "none",
    reading: Reading = Reading(),
) -> Array:
    """The score of what each row holds, [B] float32: r = h . w at its last token.

    Args:
      config: the model's shape.
      params: its parameters.
      row: "tokens" and "segment_ids", each [B, T].
      token: whose column of the unembedding is w.
      remat: what the backward pass recomputes inside a layer.
      reading: how devices that hold shares of the parameters come by what they compute with.
    """
    hidden_BTD = hidden_states(
        config, params, row["tokens"], row["segment_ids"], remat=remat, reading=reading
    )
    last_B = jnp.sum(row["segment_ids"] > 0, axis=-1) - 1
    hidden_BD = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)[:, 0]
    with jax.named_scope("head"):
        column_D = reading.unembedding(params)[:, token]
        return jnp.einsum("BD,D->B", hidden_BD, column_D, preferred_element_type=jnp.float32)


def reward_loss(
    model: LlamaConfig,
    token: int,
    *,
    remat: Remat = "none",
    compute_dtype: str = "float32",
    mesh: Mesh | None = None,
) -> LossFn:
    """The loss of `training.train` over batches of `pair_rows`; a pair is its unit of weight.

    The answers of the pairs have the token that ends a turn. `losses.bradley_terry` has the loss
    and its terms. `remat`, `compute_dtype` and `mesh` are those of `training.language_model_loss`.
    """

    def totals(
        params: Any, batch: Mapping[str, Any], step: Array, shares: parallel.Shares | None
    ) -> losses.Totals:
        del step
        reading = Reading() if shares is None else Reading.of(shares)
        rows = both_answers(batch)
        scores_B2 = scores(model, params, rows, token, remat=remat, reading=reading).reshape(-1, 2)
        return losses.reduce(*losses.bradley_terry(scores_B2[:, 0], scores_B2[:, 1]))

    return loss_of_rows(model, totals, compute_dtype=compute_dtype, mesh=mesh)


def reward_of(
    model: Model, tokenizer: Tokenizer, template: str | None = None, **options: Any
) -> Reward:
    """What a reward model gives to answers. They are tokenised anew. `options`: see `by_model`."""
    token = reward_token(tokenizer, template)

    def of_rows(params: Any, row: Mapping[str, Array], reading: Reading) -> Array:
        return scores(model.config, params, row, token, reading=reading)

    return by_model(model, of_rows, tokenizer, template, **options)


def preference_accuracy(
    model: Model,
    token: int,
    pairs: Sequence[Record],
    *,
    pairs_per_batch: int = 8,
    compute_dtype: str = "float32",
    mesh: Mesh | None = None,
) -> float:
    """The share of pairs, rows of `pair_rows`, whose chosen answer has the higher score.

    Args:
      model: the reward model.
      token: see `reward_token`.
      pairs: what it is asked about.
      pairs_per_batch: pairs in one forward pass, on each device of a mesh.
      compute_dtype: type of the computation.
      mesh: where the model lies: every device reads pairs of its own.
    """

    def right(params: Any, batch: Mapping[str, Array], reading: Reading) -> Array:
        rows = both_answers(batch)
        scores_B2 = scores(model.config, params, rows, token, reading=reading).reshape(-1, 2)
        return scores_B2[:, 0] > scores_B2[:, 1]

    jitted = values_of_rows(model.config, right, compute_dtype=compute_dtype, mesh=mesh)
    count = 0
    for part, batch in filled_batches(pairs, pairs_per_batch, mesh):
        count += int(parallel.to_host(jitted(model.params, batch))[: len(part)].sum())
    return count / len(pairs)
