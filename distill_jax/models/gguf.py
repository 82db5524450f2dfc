"""Llamas in GGUF files, llama.cpp's format, quantised or not."""

import os
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np

from distill_jax import artifacts
from distill_jax.artifacts import InputError
from distill_jax.models import interchange
from distill_jax.models.config import LlamaConfig, RopeScaling
from distill_jax.models.llama import Model, abstract_params, rotary_frequencies

_ROPE_FACTORS = "rope_freqs.weight"


def load_gguf(
    path: str | os.PathLike[str], *, dtype: Any = jnp.float32, shardings: Any | None = None
) -> Model:
    """Reads a GGUF file; quantised tensors are dequantised one at a time.

    Args:
      path: the file, on local disk.
      dtype: type of the parameters, whatever the file holds.
      shardings: a tree of `jax.sharding.Sharding` like the parameters, or None.

    Raises:
      InputError: the file is damaged or no plain Llama; a tensor is missing, extra, misshapen or
        of a type that cannot be dequantised.
    """
    reader = artifacts.open_gguf(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(reader, tensors, str(path))
    tensors.pop(_ROPE_FACTORS, None)
    slots = interchange.slots(config, "gguf")
    found = {name: tuple(map(int, tensor.shape[::-1])) for name, tensor in tensors.items()}
    interchange.check_shapes(found, {slot.name: slot.shape for slot in slots}, str(path))

    def read(slot: interchange.Slot) -> np.ndarray:
        weights = _dequantise(tensors[slot.name], str(path)).reshape(slot.shape)
        rotary = slot.path[-1] in ("query", "key")
        return _pair_by_halves(weights, config.head_dim) if rotary else weights

    params = interchange.assemble(slots, read, abstract_params(config, dtype), shardings)
    return Model(config, params)


def load_gguf_config(path: str | os.PathLike[str]) -> LlamaConfig:
    """The shape of the model in a GGUF file, without reading its weights.

    Raises:
      InputError: the file is damaged or no plain Llama.
    """
    reader = artifacts.open_gguf(path)
    return _config(reader, {tensor.name: tensor for tensor in reader.tensors}, str(path))


def _dequantise(tensor: gguf.ReaderTensor, where: str) -> np.ndarray:
    try:
        return gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise InputError(f"{where}: {tensor.name}: {error}") from error


def _pair_by_halves(weights: np.ndarray, head_dim: int) -> np.ndarray:
    """Undoes llama.cpp's reordering of q and k rows.

    Its rotary pairs are neighbours (2i, 2i + 1), so its converter interleaves the two halves of
    each head. Left as they are, the rows give a model that runs and is badly wrong.
    """
    rows, columns = weights.shape
    interleaved = weights.reshape(rows // head_dim, head_dim // 2, 2, columns)
    return interleaved.swapaxes(1, 2).reshape(rows, columns)


def _config(
    reader: gguf.GGUFReader, tensors: dict[str, gguf.ReaderTensor], where: str
) -> LlamaConfig:
    def field(name: str, default: Any = None) -> Any:
        found = reader.get_field(name)
        value = default if found is None else found.contents()
        if value is None:
            raise InputError(f"{where}: the metadata has no {name}")
        return value

    if (architecture := field("general.architecture")) != "llama":
        raise InputError(
            f"{where}: the architecture is {architecture!r}; only 'llama' is supported"
        )
    if (scaling := field("llama.rope.scaling.type", "none")) != "none":
        raise InputError(
            f"{where}: llama.rope.scaling.type is {scaling!r}; only 'none' is supported"
        )
    if "token_embd.weight" not in tensors:
        raise InputError(f"{where}: missing token_embd.weight")
    embed, heads = field("llama.embedding_length"), field("llama.attention.head_count")
    head_dim = field("llama.rope.dimension_count", embed // heads)
    theta = _shortest(field("llama.rope.freq_base", 10_000.0))
    return LlamaConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        embed=embed,
        mlp=field("llama.feed_forward_length"),
        layers=field("llama.block_count"),
        heads=heads,
        kv_heads=field("llama.attention.head_count_kv", heads),
        head_dim=field("llama.attention.key_length", head_dim),
        tied="output.weight" not in tensors,
        rope_theta=theta,
        rope_scaling=_rope_scaling(tensors.get(_ROPE_FACTORS), head_dim, theta, where),
        norm_eps=_shortest(field("llama.attention.layer_norm_rms_epsilon")),
        context=field("llama.context_length"),
    )


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: the file's 9.99999975e-06 is 1e-05."""
    return float(str(np.float32(value)))


def _rope_scaling(
    tensor: gguf.ReaderTensor | None, head_dim: int, theta: float, where: str
) -> RopeScaling | None:
    """Llama 3's scaling, which GGUF keeps as a divisor for each frequency and not as numbers.

    The factor is the largest divisor; the other three numbers are those of every published
    Llama 3, and the divisors in the file must come out of them.
    """
    if tensor is None:
        return None
    divisors = _dequantise(tensor, where).reshape(-1)
    scaling = RopeScaling(factor=float(divisors.max()))
    plain = rotary_frequencies(head_dim, theta, None)
    expected = np.asarray(plain / rotary_frequencies(head_dim, theta, scaling))
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise InputError(f"{where}: {_ROPE_FACTORS} is not the rotary scaling of Llama 3")
    return scaling
