"""Text to token ids and back: a thin, exact layer over the `tokenizers` package."""

import functools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from distill_jax import artifacts
from distill_jax.artifacts import InputError

_TRAINED_SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>")


class Tokenizer:
    """A byte-level BPE tokenizer and the roles that some of its tokens play.

    Attributes:
      bos_id: the token that opens a text, or None.
      eos_id: the token that ends a text or a turn, or None.
      pad_id: the token that fills padding; the end-of-text token (else 0) where none is named.
      chat_template: the Jinja source that turns messages into text, or None. It is data from
        outside: render it in a sandbox only.
      adds_bos: whether the model was trained with `bos_id` before every text.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
        chat_template: str | None = None,
    ):
        backend.no_truncation()
        backend.no_padding()
        self._specification = backend.to_str()
        self._plain = backend
        self._plain.encode_special_tokens = True
        self.bos_id, self.eos_id = bos_id, eos_id
        self.pad_id = next((id_ for id_ in (pad_id, eos_id) if id_ is not None), 0)
        self.chat_template = chat_template
        opening = backend.encode("", add_special_tokens=True).ids[:1]
        self.adds_bos = bos_id is not None and opening == [bos_id]

    def encode(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        """The token ids of `text`.

        A byte for which the vocabulary has no token is left out, as transformers does. SmolLM2
        lacks a few control characters.

        Args:
          text: any text. A special token spelled out in it, as `<|im_end|>`, stays plain text, so
            that data cannot forge the end of a turn.
          bos: whether to put `bos_id` first.
          special: parse special tokens in `text`. For rendered chat templates only.

        Raises:
          InputError: `bos` is asked of a tokenizer that has no `bos_id`.
        """
        backend = self._parsing if special else self._plain
        return self._opening(bos) + backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], *, bos: bool = False) -> list[list[int]]:
        """`encode` of many texts at once, on all cores."""
        opening = self._opening(bos)
        encodings = self._plain.encode_batch(list(texts), add_special_tokens=False)
        return [opening + encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens spelled out."""
        return self._plain.decode([int(id_) for id_ in ids], skip_special_tokens=False)

    def stream(self) -> Callable[[int], str]:
        """A function that takes the ids of one text, one by one, and gives what each adds to it.

        A character of several tokens comes whole, with the last of them.
        """
        stream = decoders.DecodeStream(skip_special_tokens=False)
        return lambda id_: stream.step(self._plain, id_) or ""

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self._plain.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def special_tokens(self) -> frozenset[str]:
        """Spellings of the tokens that `encode` makes of a text only if told to parse them."""
        added = self._parsing.get_added_tokens_decoder()
        return frozenset(
            token.content
            for id_, token in added.items()
            if token.special and self.encode(token.content) != [id_]
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of what the ids mean: vocabulary, merges, special tokens; no names, no paths.

        The roles (which token ends a turn) are not part of it: a base model and its chat variant
        share their ids, so one may teach the other.
        """
        specification = json.loads(self._specification)
        specials = {
            token["content"]: token["id"]
            for token in specification["added_tokens"]
            if token["special"]
        }
        return artifacts.fingerprint(
            {
                "vocabulary": self._plain.get_vocab(with_added_tokens=True),
                "merges": specification["model"]["merges"],
                "specials": specials,
            }
        )

    def token_id(self, token: str) -> int | None:
        """The id of a token given as it is spelled in the vocabulary, or None."""
        return self._plain.token_to_id(token)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json and tokenizer_config.json.

        `load_tokenizer` and transformers' `AutoTokenizer` read them back as the same tokenizer.
        """
        place = epath.Path(directory)
        place.mkdir(parents=True, exist_ok=True)
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        config: dict[str, Any] = {
            role: None if id_ is None else self._plain.id_to_token(id_)
            for role, id_ in names.items()
        }
        config |= {
            "chat_template": self.chat_template,
            "clean_up_tokenization_spaces": False,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        artifacts.write_bytes(place / "tokenizer.json", self._specification.encode())
        artifacts.write_json(
            place / "tokenizer_config.json",
            {name: value for name, value in config.items() if value is not None},
        )

    @functools.cached_property
    def _parsing(self) -> tokenizers.Tokenizer:
        """The same tokenizer with special tokens parsed: that switch is state, not an argument."""
        return tokenizers.Tokenizer.from_str(self._specification)

    def _opening(self, bos: bool) -> list[int]:
        if not bos:
            return []
        if self.bos_id is None:
            raise InputError("tokenizer: bos=True, but it has no beginning-of-text token")
        return [self.bos_id]


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, specials: Sequence[str] = ()
) -> Tokenizer:
    """Trains a byte-level BPE tokenizer (Sennrich et al. 2016) on `texts`.

    The first ids are `<|begin_of_text|>`, `<|end_of_text|>`, `<|pad|>`, then `specials`, then the
    256 bytes, then merges. The same texts give the same tokenizer.

    Raises:
      InputError: `vocab_size` does not hold the special tokens and the bytes.
    """
    names = [*_TRAINED_SPECIALS, *specials]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(names) + len(alphabet):
        raise InputError(
            f"vocab_size: {vocab_size} is less than the {len(alphabet)} bytes "
            f"and {len(names)} special tokens"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=names, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    bos_id, eos_id, pad_id = (backend.token_to_id(name) for name in _TRAINED_SPECIALS)
    open_with(backend, _TRAINED_SPECIALS[0])
    return Tokenizer(backend, bos_id=bos_id, eos_id=eos_id, pad_id=pad_id)


def open_with(backend: tokenizers.Tokenizer, token: str) -> None:
    """Makes `backend` put the special token `token` before every text, as Llama 3 does."""
    backend.post_processor = processors.TemplateProcessing(
        single=f"{token} $A",
        pair=f"{token} $A {token} $B",
        special_tokens=[(token, backend.token_to_id(token))],
    )
