"""Supervised fine-tuning: next-token cross-entropy on what the assistant said."""

import dataclasses
from collections.abc import Iterable, Sequence

from jax.sharding import Mesh

from distill_jax import losses
from distill_jax.artifacts import InputError
from distill_jax.data import Tokenizer
from distill_jax.models import LlamaConfig
from distill_jax.models.llama import Remat
from distill_jax.posttraining.chat import Example, Message, encode_chat
from distill_jax.posttraining.rows import Record, pack
from distill_jax.training import LossFn, language_model_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftConfig:
    """How conversations become rows and what is minimised on them.

    Attributes:
      sequence_length: tokens in a row; several conversations share one.
      template: a chat template in place of the tokenizer's own.
      z_loss: weight of the squared log-partition, which keeps logits from drifting; 0 is none.
    """

    sequence_length: int = 512
    template: str | None = None
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if self.sequence_length < 2:
            raise InputError(f"SftConfig.sequence_length is {self.sequence_length}; at least 2")
        if self.z_loss < 0:
            raise InputError(f"SftConfig.z_loss is {self.z_loss}; it must not be negative")


def sft_rows(
    tokenizer: Tokenizer,
    conversations: Iterable[Sequence[Message] | Example],
    config: SftConfig = SftConfig(),
) -> list[Record]:
    """Conversations as packed rows in which only the assistant's tokens are learnt.

    Args:
      tokenizer: the model's.
      conversations: messages, or examples that are tokens already (`chosen_examples`).
      config: row length and template.

    Raises:
      InputError: a conversation is malformed, or longer than a row; the message has its number.
    """
    examples = []
    for index, conversation in enumerate(conversations):
        if isinstance(conversation, Example):
            examples.append(conversation)
            continue
        try:
            examples.append(encode_chat(tokenizer, conversation, config.template))
        except InputError as error:
            raise InputError(f"conversation {index}: {error}") from error
    return pack(examples, config.sequence_length, pad_id=tokenizer.pad_id)


def sft_loss(
    model: LlamaConfig,
    config: SftConfig = SftConfig(),
    *,
    remat: Remat = "none",
    compute_dtype: str = "float32",
    mesh: Mesh | None = None,
) -> LossFn:
    """The loss of `training.train` over batches of `sft_rows`; a token is its unit of weight.

    `remat`, `compute_dtype` and `mesh` are those of `training.language_model_loss`.
    """
    objective = losses.hard_labels(z_loss=config.z_loss)
    return language_model_loss(
        model, objective, remat=remat, compute_dtype=compute_dtype, mesh=mesh
    )
