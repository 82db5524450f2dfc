"""Llamas in Hugging Face's format: a folder with config.json and safetensors files."""

import dataclasses
import itertools
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
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
from distill_jax.models.config import LlamaConfig
from distill_jax.models.hugging_face_config import (
    config_from_hugging_face,
    config_to_hugging_face,
)
from distill_jax.models.llama import Model, abstract_params

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_OLD_BUFFER = ".rotary_emb.inv_freq"


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
    config, tensors = open_hugging_face(path)
    params = interchange.assemble(
        interchange.slots(config, "hugging_face"),
        lambda slot: tensors[slot.name].read(),
        abstract_params(config, dtype),
        shardings,
    )
    return Model(config, params)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Attributes:
      file: the file.
      name: the tensor's name there.
      shape: its shape.
      dtype: its type, "float32", "float16" or "bfloat16".
      mapped: the library's slice of a file whose name is gone; None: the file can be opened anew.
    """

    file: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    mapped: Any = None

    def read(self) -> np.ndarray:
        """The tensor, in memory; a file that is here is mapped no longer than it takes."""
        if self.mapped is not None:
            return self.mapped[:]
        with safetensors.safe_open(self.file, framework="numpy") as file:
            return file.get_tensor(self.name)


def open_hugging_face(
    path: str | os.PathLike[str],
) -> tuple[LlamaConfig, dict[str, StoredTensor]]:
    """The shape that a folder of Hugging Face's describes, and its tensors by name, still unread.

    Raises:
      InputError: as `load_hugging_face`.
    """
    folder = artifacts.resolve(path)
    place = folder / _CONFIG
    config = config_from_hugging_face(artifacts.read_json(place), str(place))
    tensors = _find_tensors(folder)
    if config.tied:
        _drop_copy_of_embedding(tensors, folder)
    found = {name: tensor.shape for name, tensor in tensors.items()}
    wanted = {slot.name: slot.shape for slot in interchange.slots(config, "hugging_face")}
    interchange.check_shapes(found, wanted, str(folder))
    return config, tensors


def _find_tensors(folder: epath.Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder."""
    index = folder / _INDEX
    files = _index_files(index) if index.exists() else [_WEIGHTS]
    tensors: dict[str, StoredTensor] = {}
    with progress.bar("open", len(files), unit="files") as bar:
        for file in files:
            for name, tensor in _open(folder / file).items():
                # Old exports hold the rotary frequencies, which the config determines.
                if name.endswith(_OLD_BUFFER):
                    continue
                if name in tensors:
                    raise InputError(f"{folder / file}: {name} is in another file too")
                if tensor.dtype not in _DTYPES.values():
                    raise InputError(
                        f"{folder / file}: {name} is {tensor.dtype}; "
                        f"weights must be {', '.join(_DTYPES)}"
                    )
                tensors[name] = tensor
            bar.advance()
    return tensors


def _open(path: epath.Path) -> dict[str, StoredTensor]:
    with tempfile.TemporaryDirectory() as temporary:
        try:
            # The library maps files, hence local ones only. A mapped file outlives its name.
            remote = "://" in str(path)
            local = path.copy(f"{temporary}/{path.name}") if remote else path
            with safetensors.safe_open(local, framework="numpy") as file:
                names = file.keys()
                slices = {name: file.get_slice(name) for name in names}
                return {
                    name: StoredTensor(
                        file=os.fspath(local),
                        name=name,
                        shape=tuple(part.get_shape()),
                        dtype=_DTYPES.get(part.get_dtype(), part.get_dtype()),
                        mapped=part if remote else None,
                    )
                    for name, part in slices.items()
                }
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


def _drop_copy_of_embedding(tensors: dict[str, StoredTensor], folder: epath.Path) -> None:
    """Some tied models are stored with the matrix written twice; the copy must be one."""
    copy, original = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if copy is None or original is None:
        return
    if not np.array_equal(copy.read(), original.read()):
        raise InputError(
            f"{folder}: lm_head.weight differs from model.embed_tokens.weight, "
            "yet config.json says tie_word_embeddings"
        )
    del tensors["lm_head.weight"]


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
    write_hugging_face(
        path,
        model.config,
        lambda slot: interchange.extract(model.params, slot, dtype),
        dtype=dtype,
        bos_id=bos_id,
        eos_id=eos_id,
        max_shard_bytes=max_shard_bytes,
    )


def write_hugging_face(
    path: str | os.PathLike[str],
    shape: LlamaConfig,
    tensor: Callable[[interchange.Slot], np.ndarray],
    *,
    dtype: Any,
    bos_id: int | None = None,
    eos_id: int | Sequence[int] | None = None,
    max_shard_bytes: int = 2_000_000_000,
) -> None:
    """`export_hugging_face` of tensors that are made one by one, each only when its file is due.

    Args:
      path: the folder, made if need be.
      shape: of the model.
      tensor: gives a tensor as the file is to have it, of type `dtype`.
      dtype: float32, bfloat16 or float16.
      bos_id: goes into config.json.
      eos_id: goes into config.json.
      max_shard_bytes: as `export_hugging_face`.

    Raises:
      InputError: as `export_hugging_face`.
    """
    dtype = np.dtype(dtype)
    if dtype.name not in _DTYPES.values():
        raise InputError(f"{path}: cannot export weights as {dtype.name}")
    config = config_to_hugging_face(shape, dtype=dtype, bos_id=bos_id, eos_id=eos_id)
    folder = epath.Path(os.fspath(path))
    shards = _split(interchange.slots(shape, "hugging_face"), dtype, max_shard_bytes)
    names = [_shard_name(number, len(shards)) for number in range(len(shards))]
    writes = jax.process_index() == 0
    if writes:
        _clear(folder)
    with progress.bar("export", len(shards), unit="files") as bar:
        for name, shard in zip(names, shards):
            tensors = {slot.name: tensor(slot) for slot in shard}
            if writes:
                content = safetensors.numpy.save(tensors, metadata={"format": "pt"})
                artifacts.write_bytes(folder / name, content)
            del tensors
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
