"""config.json of Hugging Face's Llamas, in and out."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from distill_jax.artifacts import InputError
from distill_jax.models.config import LlamaConfig, RopeScaling

_REQUIRED = object()


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
