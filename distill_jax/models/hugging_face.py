"""Llamas in Hugging Face's format: a folder with config.json and safetensors files."""

import itertools
import math
import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath
from jax.experimental import multihost_utils

from distill_jax import artifacts, progress
from distill_jax.artifacts import InputError
from distill_jax.models import interchange
from distill_jax.models.config import LlamaConfig, RopeScaling
from distill_jax.models.llama import Model, abstract_params

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_OLD_BUFFER = ".rotary_emb.inv_freq"
_REQUIRED = object()


def load_hugging_face(
    path: str | os.PathLike[str], *, dtype: Any = jnp.float32, shardings: Any | None = None
) -> Model:
    """Reads a folder of Hugging Face's, single file or sharded, one tensor at a time.

    Args:
      path: the folder. Files in a bucket are first copied to the temporary directory of this
        machine, which must have room for them; a bucket that is mounted needs no copy.
      dtype: type of the parameters, whatever the files hold.
      shardings: a tree of `jax.sharding.Sharding` like the parameters, or None.

    Raises:
      InputError: the config is no plain Llama; a tensor is missing, extra or misshapen, or not
        float32, float16 or bfloat16; a file is damaged; the index points outside the folder.
    """
    folder = artifacts.resolve(path)
    place = folder / _CONFIG
    config = config_from_hugging_face(artifacts.read_json(place), str(place))
    tensors = _find_tensors(folder)
    slots = interchange.slots(config, "hugging_face")
    if config.tied:
        _drop_copy_of_embedding(tensors, folder)
    found = {name: tuple(tensor.get_shape()) for name, tensor in tensors.items()}
    interchange.check_shapes(found, {slot.name: slot.shape for slot in slots}, str(folder))
    params = interchange.assemble(
        slots,
        lambda slot: tensors[slot.name][:],
        abstract_params(config, dtype),
        shardings,
    )
    return Model(config, params)


def _find_tensors(folder: epath.Path) -> dict[str, Any]:
    """Every tensor of the folder, as the library's slices: `tensor[:]` reads it."""
    index = folder / _INDEX
    files = _index_files(index) if index.exists() else [_WEIGHTS]
    tensors: dict[str, Any] = {}
    with progress.bar("open", len(files), unit="files") as bar:
        for file in files:
            for name, tensor in _open(folder / file).items():
                # Old exports hold the rotary frequencies, which the config determines.
                if name.endswith(_OLD_BUFFER):
                    continue
                if name in tensors:
                    raise InputError(f"{folder / file}: {name} is in another file too")
                if tensor.get_dtype() not in _DTYPES:
                    raise InputError(
                        f"{folder / file}: {name} is {tensor.get_dtype()}; "
                        f"weights must be {', '.join(_DTYPES)}"
                    )
                tensors[name] = tensor
            bar.advance()
    return tensors


def _open(path: epath.Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        try:
            # The library maps files, hence local ones only. A mapped file outlives its name.
            local = path.copy(f"{temporary}/{path.name}") if "://" in str(path) else path
            with safetensors.safe_open(local, framework="numpy") as file:
                names = file.keys()
                return {name: file.get_slice(name) for name in names}
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such file") from error
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(f"{path}: cannot be read as safetensors ({error})") from error


def _index_files(index: epath.Path) -> list[str]:
    content = artifacts.read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, Mapping) else None
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise InputError(f"{index}: weight_map is missing or empty")
    for tensor, file in weight_map.items():
        name = str(file)
        if name in ("", ".", "..") or name != pathlib.PurePath(name).name:
            raise InputError(f"{index}: {tensor} is in {name!r}, which is no file of this folder")
    return sorted({str(file) for file in weight_map.values()})


def _drop_copy_of_embedding(tensors: dict[str, Any], folder: epath.Path) -> None:
    """Some tied models are stored with the matrix written twice; the copy must be one."""
    copy, original = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if copy is None or original is None:
        return
    if not np.array_equal(copy[:], original[:]):
        raise InputError(
            f"{folder}: lm_head.weight differs from model.embed_tokens.weight, "
            "yet config.json says tie_word_embeddings"
        )
    del tensors["lm_head.weight"]


def config_from_hugging_face(value: Mapping[str, Any], where: str) -> LlamaConfig:
    """The shape that a config.json describes; absent fields take transformers' defaults.

    Args:
      value: the parsed file, in the older form (rope_theta, rope_scaling) or the newer
        (rope_parameters).
      where: the file's name, for errors.

    Raises:
      InputError: a field is missing or of the wrong type, or asks for what a Llama here has not:
        another model_type or activation, biases, other rotary embeddings.
    """

    def field(name: str, kind: type, default: Any = _REQUIRED, source: Any = value) -> Any:
        found = source.get(name)
        if found is None and default is not _REQUIRED:
            return default
        kinds = (int, float) if kind is float else (kind,)
        if not isinstance(found, kinds) or (isinstance(found, bool) and kind is not bool):
            raise InputError(f"{where}: {name} is {found!r}, not {kind.__name__}")
        return found

    if not isinstance(value, Mapping):
        raise InputError(f"{where}: not a JSON object")
    for name, allowed, default in (
        ("model_type", "llama", None),
        ("hidden_act", "silu", "silu"),
        ("attention_bias", False, False),
        ("mlp_bias", False, False),
    ):
        if value.get(name, default) != allowed:
            raise InputError(
                f"{where}: {name} is {value.get(name)!r}; only {allowed!r} is supported"
            )
    rope = field("rope_parameters", dict, None) or field("rope_scaling", dict, {})
    embed, heads = field("hidden_size", int), field("num_attention_heads", int)
    theta = field("rope_theta", float, 10_000.0, source={**value, **rope})
    return LlamaConfig(
        vocab_size=field("vocab_size", int),
        embed=embed,
        mlp=field("intermediate_size", int),
        layers=field("num_hidden_layers", int),
        heads=heads,
        kv_heads=field("num_key_value_heads", int, heads),
        head_dim=field("head_dim", int, embed // max(heads, 1)),
        tied=field("tie_word_embeddings", bool, False),
        rope_theta=float(theta),
        rope_scaling=_rope_scaling(rope, where),
        norm_eps=float(field("rms_norm_eps", float, 1e-6)),
        context=field("max_position_embeddings", int, 2048),
    )


def _rope_scaling(rope: Mapping[str, Any], where: str) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise InputError(
            f"{where}: rope_type is {kind!r}; only 'default' and 'llama3' are supported"
        )
    try:
        return RopeScaling(
            factor=float(rope["factor"]),
            low_frequency_factor=float(rope["low_freq_factor"]),
            high_frequency_factor=float(rope["high_freq_factor"]),
            original_context=int(rope["original_max_position_embeddings"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: rope_scaling: {error!r}") from error


def config_to_hugging_face(
    config: LlamaConfig,
    *,
    dtype: Any = jnp.float32,
    bos_id: int | None = None,
    eos_id: int | Sequence[int] | None = None,
) -> dict[str, Any]:
    """The content of a config.json that transformers, vLLM and llama.cpp read.

    Args:
      config: the shape.
      dtype: type of the weights beside it.
      bos_id: the token that begins a text, or None.
      eos_id: the token, or tokens, that end one, or None.

    Raises:
      InputError: `embed` is no multiple of `heads`, which transformers refuses.
    """
    if config.embed % config.heads:
        raise InputError(
            f"LlamaConfig.embed is {config.embed}, not a multiple of heads {config.heads}: "
            "transformers refuses such a Llama"
        )
    scaling = config.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.context,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_context,
        },
        "bos_token_id": bos_id,
        "eos_token_id": list(eos_id) if isinstance(eos_id, Sequence) else eos_id,
        "torch_dtype": np.dtype(dtype).name,
    }


def export_hugging_face(
    path: str | os.PathLike[str],
    model: Model,
    *,
    dtype: Any | None = None,
    bos_id: int | None = None,
    eos_id: int | Sequence[int] | None = None,
    max_shard_bytes: int = 2_000_000_000,
) -> None:
    """Writes a folder that transformers' `from_pretrained` reads; replaces an export that is there.

    config.json is written last, so a folder that has one is whole. With several processes all must
    call it; the first one writes.

    Args:
      path: the folder, made if need be.
      model: what to write.
      dtype: float32, bfloat16 or float16; None keeps the parameters' own.
      bos_id: goes into config.json.
      eos_id: goes into config.json.
      max_shard_bytes: a larger model is split into files of at most this size (or one tensor);
        writing one takes three times its size in memory.

    Raises:
      InputError: the parameters are not those of the config, other programs cannot hold such a
        model, or the type is not one of the three; nothing is written then.
    """
    interchange.check_params(model.config, model.params, str(path))
    dtype = np.dtype(dtype if dtype is not None else model.params["embedding"].dtype)
    if dtype.name not in _DTYPES.values():
        raise InputError(f"{path}: cannot export weights as {dtype.name}")
    config = config_to_hugging_face(model.config, dtype=dtype, bos_id=bos_id, eos_id=eos_id)
    folder = epath.Path(os.fspath(path))
    shards = _split(interchange.slots(model.config, "hugging_face"), dtype, max_shard_bytes)
    names = [_shard_name(number, len(shards)) for number in range(len(shards))]
    writes = jax.process_index() == 0
    if writes:
        _clear(folder)
    with progress.bar("export", len(shards), unit="files") as bar:
        for name, shard in zip(names, shards):
            tensors = {slot.name: interchange.extract(model.params, slot, dtype) for slot in shard}
            if writes:
                content = safetensors.numpy.save(tensors, metadata={"format": "pt"})
                artifacts.write_bytes(folder / name, content)
            bar.advance()
    if writes:
        if len(shards) > 1:
            artifacts.write_json(folder / _INDEX, _index(names, shards, dtype))
        artifacts.write_json(folder / _CONFIG, config)
    multihost_utils.sync_global_devices(f"export {folder}")


def _clear(folder: epath.Path) -> None:
    """Config first: what a crash leaves must not look like a model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _CONFIG).unlink(missing_ok=True)
    for file in itertools.chain(folder.glob("model*.safetensors"), folder.glob(_INDEX)):
        file.unlink()


def _split(
    slots: list[interchange.Slot], dtype: np.dtype, max_bytes: int
) -> list[list[interchange.Slot]]:
    shards: list[list[interchange.Slot]] = [[]]
    used = 0
    for slot in slots:
        size = _size(slot, dtype)
        if shards[-1] and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(slot)
        used += size
    return shards


def _size(slot: interchange.Slot, dtype: np.dtype) -> int:
    return math.prod(slot.shape) * dtype.itemsize


def _shard_name(number: int, count: int) -> str:
    return _WEIGHTS if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _index(
    names: list[str], shards: list[list[interchange.Slot]], dtype: np.dtype
) -> dict[str, Any]:
    return {
        "metadata": {"total_size": sum(_size(slot, dtype) for shard in shards for slot in shard)},
        "weight_map": {slot.name: name for name, shard in zip(names, shards) for slot in shard},
    }
