"""Our own checkpoints of a model, and loading from whichever format a path holds."""

import os
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from distill_jax import artifacts
from distill_jax.artifacts import InputError
from distill_jax.models import interchange
from distill_jax.models.config import LlamaConfig
from distill_jax.models.gguf import load_gguf, load_gguf_config
from distill_jax.models.hugging_face import load_hugging_face
from distill_jax.models.hugging_face_config import config_from_hugging_face
from distill_jax.models.llama import Model, Params, abstract_params

_CONFIG = "model.json"
_HUGGING_FACE_CONFIG = "config.json"
_PARAMS = "params"
_FORMAT = 1


def load(
    path: str | os.PathLike[str], *, dtype: Any = jnp.float32, shardings: Any | None = None
) -> Model:
    """Reads a model from our checkpoint directory, a Hugging Face folder, or a GGUF file.

    Args:
      path: what `artifacts.resolve` takes.
      dtype: type of the parameters, whatever is stored.
      shardings: a tree of `jax.sharding.Sharding` like the parameters, so that no process holds
        more than its devices do. None: whole arrays on the default device.

    Raises:
      InputError: nothing is there, or what is there is none of the three, damaged, or another
        model than its config says.
    """
    place = artifacts.resolve(path)
    match _format_of(place):
        case "gguf":
            return load_gguf(path, dtype=dtype, shardings=shardings)
        case "hugging_face":
            return load_hugging_face(path, dtype=dtype, shardings=shardings)
        case "ours":
            return _load_checkpoint(place, dtype, shardings)


def load_config(path: str | os.PathLike[str]) -> LlamaConfig:
    """The shape of the model that `load` would read, without reading its weights.

    Raises:
      InputError: as `load`.
    """
    place = artifacts.resolve(path)
    match _format_of(place):
        case "gguf":
            return load_gguf_config(path)
        case "hugging_face":
            config = place / _HUGGING_FACE_CONFIG
            return config_from_hugging_face(artifacts.read_json(config), str(config))
        case "ours":
            return _read_config(place)


def _format_of(place: epath.Path) -> Literal["gguf", "hugging_face", "ours"]:
    if place.is_file():
        return "gguf"
    if (place / _CONFIG).exists():
        return "ours"
    if (place / _HUGGING_FACE_CONFIG).exists():
        return "hugging_face"
    raise InputError(f"{place}: neither {_CONFIG} nor {_HUGGING_FACE_CONFIG} is in this directory")


def is_saved(path: str | os.PathLike[str]) -> bool:
    """Whether a whole model of `save` is there."""
    return (epath.Path(os.fspath(path)) / _CONFIG).exists()


def save(path: str | os.PathLike[str], model: Model) -> None:
    """Writes our checkpoint, a directory with model.json and params/; replaces one that is there.

    model.json is written last, so a directory that has one is whole. Arrays may be sharded; with
    several processes all must call it.

    Raises:
      InputError: the parameters are not those of the config; nothing is written then.
    """
    interchange.check_params(model.config, model.params, str(path))
    place = epath.Path(os.fspath(path)).absolute()
    if jax.process_index() == 0:
        place.mkdir(parents=True, exist_ok=True)
        (place / _CONFIG).unlink(missing_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(place / _PARAMS, model.params, force=True)
    if jax.process_index() == 0:
        artifacts.write_json(place / _CONFIG, {"format": _FORMAT, "config": model.config.to_json()})
    multihost_utils.sync_global_devices(f"save {place}")


def remove(path: str | os.PathLike[str]) -> None:
    """Deletes what `save` wrote; what else is in the directory stays."""
    place = epath.Path(os.fspath(path))
    (place / _CONFIG).unlink(missing_ok=True)
    (place / _PARAMS).rmtree(missing_ok=True)


def _read_config(place: epath.Path) -> LlamaConfig:
    description = artifacts.read_json(place / _CONFIG)
    known = isinstance(description, dict) and description.get("format") == _FORMAT
    if not known or not isinstance(description.get("config"), dict):
        raise InputError(f"{place / _CONFIG}: not a model description of format {_FORMAT}")
    return LlamaConfig.from_json(description["config"])


def _load_checkpoint(place: epath.Path, dtype: Any, shardings: Any | None) -> Model:
    config = _read_config(place)
    return Model(config, _restore(place.absolute() / _PARAMS, config, dtype, shardings))


def _restore(place: epath.Path, config: LlamaConfig, dtype: Any, shardings: Any | None) -> Params:
    if not place.exists():
        raise InputError(f"{place}: no such directory")
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(place).item_metadata
        if metadata is None:
            raise InputError(f"{place}: not an Orbax checkpoint")
        interchange.check_params(config, metadata.tree, str(place))
        abstract = abstract_params(config, dtype)
        try:
            if shardings is not None:
                return checkpointer.restore(place, jax.tree.map(_on_devices, abstract, shardings))
            # Arrays restored through NumPy are not committed to a device, so that a computation
            # on a mesh can take them.
            hosted = jax.tree.map(lambda leaf: np.empty((), leaf.dtype), abstract)
            return jax.tree.map(jnp.asarray, checkpointer.restore(place, hosted))
        except (ValueError, OSError) as error:
            raise InputError(f"{place}: damaged ({str(error).splitlines()[0]})") from error


def _on_devices(
    leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding
) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
