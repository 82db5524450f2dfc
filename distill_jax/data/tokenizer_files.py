"""Tokenizers as others store them: in GGUF metadata, Hugging Face folders, tiktoken files."""

import base64
import binascii
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tokenizers
from etils import epath
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from distill_jax import artifacts
from distill_jax.artifacts import InputError
from distill_jax.data.tokenizer import Tokenizer, open_with

# llama-models, llama3/tokenizer.py; special tokens are named as in Llama 3.1's tokenizer.json.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_NAMED_SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
_LLAMA3_SPECIALS = _LLAMA3_NAMED_SPECIALS + tuple(
    f"<|reserved_special_token_{i}|>" for i in range(3, 256 - len(_LLAMA3_NAMED_SPECIALS) + 3)
)

# `tokenizer.ggml.pre` names, by the way of splitting that they stand for in llama.cpp.
_GPT2_SPLIT_NAMES = frozenset({"gpt-2", "mpt", "olmo", "phi-2"})
_DIGITS_SPLIT_NAMES = frozenset({"smollm", "starcoder", "refact", "command-r"})
_LLAMA3_SPLIT_NAMES = frozenset({"llama-bpe", "llama3", "llama-v3"})
_GGUF_CONTROL, _GGUF_USER_DEFINED = 3, 4


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Reads a tokenizer.

    Args:
      path: a `.gguf` file; a folder with `tokenizer.json` (Hugging Face's or a checkpoint of
        ours) or with a tiktoken-format `tokenizer.model` (Llama 3); or one of those two files.

    Raises:
      InputError: nothing is there, or it is no tokenizer of these kinds.
    """
    place = artifacts.resolve(path)
    if place.is_dir():
        for name in ("tokenizer.json", "tokenizer.model"):
            if (place / name).exists():
                place = place / name
                break
        else:
            raise InputError(f"{path}: no tokenizer.json or tokenizer.model inside")
    if place.suffix == ".gguf":
        return _from_gguf(place)
    if place.suffix == ".json":
        return _from_hugging_face(place)
    if place.suffix in (".model", ".tiktoken"):
        return _from_tiktoken(place)
    raise InputError(f"{path}: a tokenizer is a .gguf, tokenizer.json or tokenizer.model file")


def _from_gguf(path: epath.Path) -> Tokenizer:
    fields = _gguf_metadata(path)
    kind = fields("tokenizer.ggml.model")
    if kind != "gpt2":
        raise InputError(f"{path}: tokenizer.ggml.model is {kind!r}; only byte-level BPE is read")
    tokens = fields("tokenizer.ggml.tokens")
    halves = [merge.partition(" ") for merge in fields("tokenizer.ggml.merges")]
    split_name = fields("tokenizer.ggml.pre")
    try:
        backend = _byte_level_bpe(
            {token: id_ for id_, token in enumerate(tokens)},
            [(left, right) for left, _, right in halves],
            split=_gguf_split(path, split_name),
            ignore_merges=split_name in _LLAMA3_SPLIT_NAMES,
        )
    except ValueError as error:
        raise InputError(f"{path}: tokenizer.ggml.merges do not fit the tokens ({error})") from None
    kinds = fields("tokenizer.ggml.token_type", [])
    for token, token_kind in zip(tokens, kinds):
        if token_kind in (_GGUF_CONTROL, _GGUF_USER_DEFINED):
            _add(backend, token, special=token_kind == _GGUF_CONTROL)

    def role(name: str) -> int | None:
        id_ = fields(f"tokenizer.ggml.{name}_token_id", None)
        if id_ is not None and id_ >= len(tokens):
            raise InputError(f"{path}: {name}_token_id {id_} is not below {len(tokens)} tokens")
        return id_

    bos_id = role("bos")
    if bos_id is not None and fields("tokenizer.ggml.add_bos_token", False):
        open_with(backend, tokens[bos_id])
    return Tokenizer(
        backend,
        bos_id=bos_id,
        eos_id=role("eos"),
        pad_id=role("padding"),
        chat_template=fields("tokenizer.chat_template", None),
    )


def _gguf_metadata(path: epath.Path) -> Callable[..., Any]:
    """A function of a field's name, and of what to return where the file lacks it."""
    reader = artifacts.open_gguf(path)

    def field(name: str, *default: Any) -> Any:
        found = reader.get_field(name)
        if found is not None:
            return found.contents()
        if default:
            return default[0]
        raise InputError(f"{path}: the metadata field {name} is missing")

    return field


def _gguf_split(path: epath.Path, name: str) -> pre_tokenizers.PreTokenizer:
    if name in _GPT2_SPLIT_NAMES:
        return _gpt2_split()
    if name in _DIGITS_SPLIT_NAMES:
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), _gpt2_split()]
        )
    if name in _LLAMA3_SPLIT_NAMES:
        return _llama3_split()
    raise InputError(f"{path}: tokenizer.ggml.pre is {name!r}, a way of splitting not known here")


def _from_hugging_face(path: epath.Path) -> Tokenizer:
    specification = artifacts.read_json(path)
    kind = specification.get("model", {}).get("type") if isinstance(specification, dict) else None
    if kind != "BPE":
        raise InputError(f"{path}: model.type is {kind!r}; only BPE is read")
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(specification))
    except Exception as error:  # the package raises bare Exception
        raise InputError(f"{path}: not a tokenizer ({error})") from error
    config_path = path.parent / "tokenizer_config.json"
    config = artifacts.read_json(config_path) if config_path.exists() else {}

    def role(name: str) -> int | None:
        token = config.get(name)
        token = token.get("content") if isinstance(token, Mapping) else token
        if token is None:
            return None
        id_ = backend.token_to_id(token)
        if id_ is None:
            raise InputError(f"{config_path}: {name} {token!r} is not in the vocabulary")
        return id_

    return Tokenizer(
        backend,
        bos_id=role("bos_token"),
        eos_id=role("eos_token"),
        pad_id=role("pad_token"),
        chat_template=_hugging_face_chat_template(path.parent, config),
    )


def _hugging_face_chat_template(folder: epath.Path, config: Mapping[str, Any]) -> str | None:
    """The default template: newer folders keep it in a file, older ones several in a list."""
    alone = folder / "chat_template.jinja"
    if alone.exists():
        return alone.read_text()
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _from_tiktoken(path: epath.Path) -> Tokenizer:
    """Llama 3's own file: a line per token, its bytes in base64 and its rank, which is its id."""
    ranks: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error) as error:
        raise InputError(
            f"{path}: not a tiktoken file of base64 tokens and ranks ({error}); "
            "SentencePiece files are not read"
        ) from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise InputError(f"{path}: ranks are not 0 to {len(ranks) - 1}, each once")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise InputError(f"{path}: no token for byte {missing[0]}")

    spelling = _byte_spelling()

    def spell(token: bytes) -> str:
        return "".join(spelling[byte] for byte in token)

    backend = _byte_level_bpe(
        {spell(token): rank for token, rank in ranks.items()},
        [(spell(left), spell(right)) for left, right in _merges_from_ranks(ranks)],
        split=_llama3_split(),
        ignore_merges=True,
    )
    for token in _LLAMA3_SPECIALS:
        _add(backend, token, special=True)
    open_with(backend, "<|begin_of_text|>")
    return Tokenizer(
        backend,
        bos_id=backend.token_to_id("<|begin_of_text|>"),
        eos_id=backend.token_to_id("<|end_of_text|>"),
        pad_id=backend.token_to_id("<|finetune_right_pad_id|>"),
    )


def _merges_from_ranks(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """tiktoken's rule as merges: any two neighbours may join, lowest rank of the whole first."""
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(left, right) for left, right in halves if left in ranks and right in ranks]
        merges += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def _byte_level_bpe(
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    *,
    split: pre_tokenizers.PreTokenizer,
    ignore_merges: bool,
) -> tokenizers.Tokenizer:
    """A BPE backend; `ignore_merges` keeps a piece whole that is a token, however merges go."""
    try:
        model = models.BPE(vocab=dict(vocabulary), merges=list(merges), ignore_merges=ignore_merges)
    except Exception as error:  # the package raises bare Exception
        raise ValueError(str(error)) from error
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = split
    backend.decoder = decoders.ByteLevel()
    return backend


def _add(backend: tokenizers.Tokenizer, token: str, *, special: bool) -> None:
    added = AddedToken(token, special=special, normalized=False)
    if special:
        backend.add_special_tokens([added])
    else:
        backend.add_tokens([added])


def _gpt2_split() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _llama3_split() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _byte_spelling() -> list[str]:
    """GPT-2's printable character for each byte; bytes that print as nothing move past 255."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = iter(range(256, 512))
    return [chr(byte if byte in printable else next(moved)) for byte in range(256)]
