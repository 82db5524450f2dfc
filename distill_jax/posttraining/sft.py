"""Supervised fine-tuning: next-token cross-entropy on what the assistant said."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from jax.sharding import Mesh

from distill_jax import losses
from distill_jax.artifacts import InputError, check_choices
from distill_jax.data import BadRows, Rejects, Tokenizer
from distill_jax.models import LlamaConfig
from distill_jax.models.llama import Remat
from distill_jax.posttraining.chat import Example, Message, encode_chat
from distill_jax.posttraining.conversations import Form, read_conversations, sources
from distill_jax.posttraining.rows import Record, check_example, pack
from distill_jax.posttraining.tasks import TASK
from distill_jax.training import LossFn, language_model_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Which conversations, how they become rows, and what is minimised on them.

    Attributes:
      data: where conversations come from, one source or several: a file, a folder or a TFDS
        dataset as `data.read_records` takes it, `gs://` too; "task" is the right answers of the
        recipe's task.
      form: how records hold a conversation, as `posttraining.to_conversation` reads it; "auto" is
        found out from the fields of each.
      split: of sources that are TFDS datasets.
      bad_rows: whether a record that cannot be used (not JSON, a field missing, an unknown role,
        an empty answer, longer than a row) is refused, or skipped and counted.
      sequence_length: tokens in a row; several conversations share one.
      template: a chat template in place of the tokenizer's own.
      z_loss: weight of the squared log-partition, which keeps logits from drifting; 0 is none.
    """

    data: str | tuple[str, ...] = TASK
    form: Form = "auto"
    split: str = "train"
    bad_rows: BadRows = "refuse"
    sequence_length: int = 512
    template: str | None = None
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        check_choices(self, {"form": Form, "bad_rows": BadRows})
        if self.sequence_length < 2:
            raise InputError(f"SftConfig.sequence_length is {self.sequence_length}; at least 2")
        if self.z_loss < 0:
            raise InputError(f"SftConfig.z_loss is {self.z_loss}; it must not be negative")

    @property
    def uses_task(self) -> bool:
        """Whether the right answers of the task are among the data."""
        return TASK in sources(self.data)

    @property
    def files(self) -> tuple[str, ...]:
        """The other sources."""
        return tuple(source for source in sources(self.data) if source != TASK)

    def conversations(self, rejects: Rejects) -> Iterator[tuple[str, list[Message]]]:
        """Those of the files; see `read_conversations`."""
        return read_conversations(self.files, form=self.form, split=self.split, rejects=rejects)


def read_examples(tokenizer: Tokenizer, config: SftConfig, rejects: Rejects) -> Iterator[Example]:
    """The conversations of the config's files, in tokens; each fits in a row.

    Args:
      tokenizer: the model's.
      config: names the files.
      rejects: decides about records that cannot be used.

    Raises:
      InputError: no file is there, or a record is refused, with its file and line.
    """
    for place, messages in config.conversations(rejects):
        with rejects.at(place):
            example = encode_chat(tokenizer, messages, config.template)
            check_example(example, config.sequence_length)
            yield example


def to_examples(
    tokenizer: Tokenizer,
    conversations: Iterable[Sequence[Message] | Example],
    template: str | None = None,
) -> list[Example]:
    """Conversations in tokens, of which only the assistant's are to be learnt.

    Args:
      tokenizer: the model's.
      conversations: messages, or examples that are tokens already (`read_examples`,
        `chosen_examples`).
      template: a chat template in place of the tokenizer's own.

    Raises:
      InputError: a conversation is malformed; the message has its number.
    """
    examples = []
    for index, conversation in enumerate(conversations):
        if isinstance(conversation, Example):
            examples.append(conversation)
            continue
        try:
            examples.append(encode_chat(tokenizer, conversation, template))
        except InputError as error:
            raise InputError(f"conversation {index}: {error}") from error
    return examples


def sft_rows(
    tokenizer: Tokenizer,
    conversations: Iterable[Sequence[Message] | Example],
    config: SftConfig = SftConfig(),
) -> list[Record]:
    """Packed rows of `to_examples`.

    Args:
      tokenizer: the model's.
      conversations: as `to_examples` takes them.
      config: row length and template.

    Raises:
      InputError: a conversation is malformed, or longer than a row; the message has its number.
    """
    examples = to_examples(tokenizer, conversations, config.template)
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
