"""How other programs store each parameter, and moving tensors between their files and our tree.

Tensors pass one at a time: beside the finished parameters, memory holds one stacked parameter and
one tensor of one layer.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from distill_jax import progress
from distill_jax.artifacts import InputError
from distill_jax.models.config import LlamaConfig
from distill_jax.models.llama import Params, abstract_params, logical_axes

Program = Literal["hugging_face", "gguf"]
"""Whose file format it is."""
Path = tuple[str, ...]
"""Keys from the root of the parameter tree to a leaf."""


@dataclasses.dataclass(frozen=True)
class _Layout:
    """One parameter outside: its names, `{}` for the layer, and the logical axes of each axis."""

    hugging_face: str
    gguf: str
    axes: tuple[tuple[str, ...], ...]


_NORM = (("embed",),)
_QUERY = (("heads", "head_dim"), ("embed",))
_KEY_VALUE = (("kv_heads", "head_dim"), ("embed",))
_WIDEN = (("mlp",), ("embed",))
_VOCAB = (("vocab",), ("embed",))
_HF_LAYER = "model.layers.{}."

_BEFORE_LAYERS: dict[Path, _Layout] = {
    ("embedding",): _Layout("model.embed_tokens.weight", "token_embd.weight", _VOCAB),
}
_LAYER: dict[Path, _Layout] = {
    ("layers", "attention", "norm"): _Layout(
        _HF_LAYER + "input_layernorm.weight", "blk.{}.attn_norm.weight", _NORM
    ),
    ("layers", "attention", "query"): _Layout(
        _HF_LAYER + "self_attn.q_proj.weight", "blk.{}.attn_q.weight", _QUERY
    ),
    ("layers", "attention", "key"): _Layout(
        _HF_LAYER + "self_attn.k_proj.weight", "blk.{}.attn_k.weight", _KEY_VALUE
    ),
    ("layers", "attention", "value"): _Layout(
        _HF_LAYER + "self_attn.v_proj.weight", "blk.{}.attn_v.weight", _KEY_VALUE
    ),
    ("layers", "attention", "output"): _Layout(
        _HF_LAYER + "self_attn.o_proj.weight", "blk.{}.attn_output.weight", _QUERY[::-1]
    ),
    ("layers", "mlp", "norm"): _Layout(
        _HF_LAYER + "post_attention_layernorm.weight", "blk.{}.ffn_norm.weight", _NORM
    ),
    ("layers", "mlp", "gate"): _Layout(
        _HF_LAYER + "mlp.gate_proj.weight", "blk.{}.ffn_gate.weight", _WIDEN
    ),
    ("layers", "mlp", "up"): _Layout(
        _HF_LAYER + "mlp.up_proj.weight", "blk.{}.ffn_up.weight", _WIDEN
    ),
    ("layers", "mlp", "down"): _Layout(
        _HF_LAYER + "mlp.down_proj.weight", "blk.{}.ffn_down.weight", _WIDEN[::-1]
    ),
}
_AFTER_LAYERS: dict[Path, _Layout] = {
    ("final_norm",): _Layout("model.norm.weight", "output_norm.weight", _NORM),
    ("unembedding",): _Layout("lm_head.weight", "output.weight", _VOCAB),
}


@dataclasses.dataclass(frozen=True)
class Slot:
    """One tensor of another program's file, and the place in our tree where it belongs.

    Attributes:
      name: the tensor's name in the file.
      shape: its shape there.
      path: keys that lead to the parameter in our tree.
      layer: index on the parameter's leading "layers" axis, or None outside the layers.
      split: the file's shape with merged axes taken apart, for example (heads, head_dim, embed).
      order: where each of our axes, less "layers", stands in `split`.
    """

    name: str
    shape: tuple[int, ...]
    path: Path
    layer: int | None
    split: tuple[int, ...]
    order: tuple[int, ...]

    def from_stored(self, tensor: np.ndarray) -> np.ndarray:
        """The file's tensor as a view in our axis order."""
        return tensor.reshape(self.split).transpose(self.order)

    def to_stored(self, array: np.ndarray) -> np.ndarray:
        """Our array, of one layer, as the contiguous tensor that goes into the file."""
        back = np.argsort(self.order)
        return np.ascontiguousarray(array.transpose(back)).reshape(self.shape)


def slots(config: LlamaConfig, program: Program) -> list[Slot]:
    """Every tensor of a model in the order in which files list them."""
    sizes = {
        "vocab": config.vocab_size,
        "embed": config.embed,
        "mlp": config.mlp,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
    }
    axes = logical_axes(config)

    def slot(path: Path, layout: _Layout, layer: int | None) -> Slot:
        stored = [name for group in layout.axes for name in group]
        ours = [name for name in get(axes, path) if name != "layers"]
        return Slot(
            name=getattr(layout, program).format(layer),
            shape=tuple(math.prod(sizes[name] for name in group) for group in layout.axes),
            path=path,
            layer=layer,
            split=tuple(sizes[name] for name in stored),
            order=tuple(stored.index(name) for name in ours),
        )

    after = {path: layout for path, layout in _AFTER_LAYERS.items() if path[0] in axes}
    return [
        *(slot(path, layout, None) for path, layout in _BEFORE_LAYERS.items()),
        *(
            slot(path, layout, layer)
            for layer in range(config.layers)
            for path, layout in _LAYER.items()
        ),
        *(slot(path, layout, None) for path, layout in after.items()),
    ]


def get(tree: Params, path: Path) -> Any:
    """The leaf of a nested dict at `path`."""
    return functools.reduce(lambda node, key: node[key], path, tree)


def check_shapes(
    found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Compares names and shapes of tensors.

    Raises:
      InputError: one line that names every missing, extra and misshapen tensor of `where`.
    """
    complaints = [f"missing {name}" for name in wanted if name not in found]
    complaints += [f"extra {name}" for name in found if name not in wanted]
    complaints += [
        f"{name} has shape {tuple(found[name])}, not {shape}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name]) != shape
    ]
    if complaints:
        raise InputError(f"{where}: {'; '.join(complaints)}")


def check_params(config: LlamaConfig, params: Params, where: str) -> None:
    """Compares parameters, or their metadata, with the shapes that the config gives them.

    Raises:
      InputError: one line that names every missing, extra and misshapen parameter.
    """
    check_shapes(_shapes(params), _shapes(abstract_params(config)), where)


def _shapes(tree: Params) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves
    }


def assemble(
    stored: Iterable[Slot],
    read: Callable[[Slot], np.ndarray],
    abstract: Params,
    shardings: Any | None = None,
) -> Params:
    """Our parameters, read tensor by tensor.

    Args:
      stored: the model's tensors, from `slots`.
      read: gives one tensor as the file has it; its type is cast to the parameter's.
      abstract: shapes and types wanted, from `abstract_params`.
      shardings: a tree of `jax.sharding.Sharding` like the parameters; each process then keeps only
        what its own devices hold. None: whole arrays on the default device, uncommitted.
    """
    by_path: dict[Path, list[Slot]] = {}
    for slot in stored:
        by_path.setdefault(slot.path, []).append(slot)
    params: Params = {}
    with progress.bar("load", sum(map(len, by_path.values())), unit="tensors") as bar:
        for path, parts in by_path.items():
            sharding = get(shardings, path) if shardings is not None else None
            node = functools.reduce(lambda node, key: node.setdefault(key, {}), path[:-1], params)
            node[path[-1]] = _assemble_one(parts, read, get(abstract, path), sharding)
            bar.advance(len(parts))
    return params


def _assemble_one(
    parts: list[Slot],
    read: Callable[[Slot], np.ndarray],
    abstract: jax.ShapeDtypeStruct,
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
    shape, dtype = abstract.shape, abstract.dtype
    indices: list[Any] = [None]
    if sharding is not None:
        indices = list(sharding.addressable_devices_indices_map(shape).values())
    regions = {
        bounds: np.empty([stop - start for start, stop in bounds], dtype)
        for bounds in (_bounds(index, shape) for index in indices)
    }
    for slot in parts:
        tensor = slot.from_stored(read(slot))
        for bounds, region in regions.items():
            if slot.layer is None:
                region[...] = tensor[_slices(bounds)]
            elif bounds[0][0] <= slot.layer < bounds[0][1]:
                region[slot.layer - bounds[0][0]] = tensor[_slices(bounds[1:])]
    if sharding is None:
        return jnp.asarray(next(iter(regions.values())))
    return jax.make_array_from_callback(
        shape, sharding, lambda index: regions[_bounds(index, shape)]
    )


def _bounds(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """(start, stop) of each axis: what a dict can be keyed by, which slices cannot before 3.12."""
    index = index or (slice(None),) * len(shape)
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape))


def _slices(bounds: Iterable[tuple[int, int]]) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in bounds)


def extract(params: Params, slot: Slot, dtype: Any) -> np.ndarray:
    """The tensor that goes into a file, on the host.

    With several processes all of them must ask for the same tensors in the same order.
    """
    array = get(params, slot.path)
    if slot.layer is not None:
        array = array[slot.layer]
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    return slot.to_stored(np.asarray(array).astype(dtype, copy=False))
