"""Surgery from file to file, for a model that no memory holds."""

import os

import numpy as np

from distill_jax import models
from distill_jax.artifacts import InputError, diff, read_json, resolve
from distill_jax.models import interchange
from distill_jax.pruning.plan import Plan
from distill_jax.pruning.surgery import take_layer, weight_scales


def prune_files(
    plan: Plan,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    max_shard_bytes: int = 1_000_000_000,
) -> None:
    """Prunes a folder of Hugging Face's into another, tensor by tensor.

    What it writes is, byte for byte, what `apply_plan` and `models.export_hugging_face` would make
    of the model in memory. Memory: three times `max_shard_bytes`, and the largest tensor of the
    source one and a half times; the 8B's is 1.05 GB in bfloat16. The tokenizer's files are not
    copied.

    Args:
      plan: what to keep.
      source: the folder of the model to prune, single file or sharded.
      out: the folder to write, of the source's types; replaces an export that is there.
      max_shard_bytes: of the files written.

    Raises:
      InputError: the plan merges key/value heads, the folder holds another shape than the plan's
        source, or its tensors are of several types; or as `models.load_hugging_face`. Nothing is
        written then.
    """
    if plan.merged_kv_heads is not None:
        raise InputError(
            "prune_files: the plan merges key/value heads, which takes the model in memory; "
            "make it with kv_choice='drop'"
        )
    config, tensors = models.open_hugging_face(source)
    changes = diff(config.to_json(), plan.source.to_json())
    if changes:
        raise InputError(f"{source}: not the model that the plan cuts ({'; '.join(changes)})")
    dtypes = sorted({tensor.dtype for tensor in tensors.values()})
    if len(dtypes) > 1:
        raise InputError(f"{source}: tensors are of several types: {', '.join(dtypes)}")
    if os.path.realpath(source) == os.path.realpath(out):
        raise InputError(f"{out}: would be overwritten while it is read")
    stored = {(slot.path, slot.layer): slot for slot in interchange.slots(config, "hugging_face")}
    axes, scales = models.logical_axes(config), weight_scales(plan)

    def tensor(slot: interchange.Slot) -> np.ndarray:
        layer = slot.layer if slot.layer is None else int(plan.layers[slot.layer])
        before = stored[slot.path, layer]
        names = tuple(name for name in interchange.get(axes, slot.path) if name != "layers")
        whole = before.from_stored(tensors[before.name].read())
        kept = take_layer(plan, whole, names, slot.layer)
        factor = scales.get(slot.path)
        if factor is not None:
            factor = factor if factor.ndim == 0 else factor[slot.layer]
            kept = (kept.astype(np.float32) * factor).astype(kept.dtype)
        return slot.to_stored(kept)

    described = read_json(resolve(source) / "config.json")
    models.write_hugging_face(
        out,
        plan.target,
        tensor,
        dtype=dtypes[0],
        bos_id=described.get("bos_token_id"),
        eos_id=described.get("eos_token_id"),
        max_shard_bytes=max_shard_bytes,
    )
