"""The shape of a Llama."""

import dataclasses
from typing import Any

from distill_jax.artifacts import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's frequency-dependent stretching of rotary embeddings (Llama 3 paper, 3.4.3).

    Attributes:
      factor: how much longer the context becomes; low frequencies are divided by it.
      low_frequency_factor: wavelengths above `original_context` / this are divided by `factor`.
      high_frequency_factor: wavelengths below `original_context` / this stay; those between are
        interpolated.
      original_context: the context length of pretraining, in tokens.
    """

    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes and constants of a Llama.

    Attributes:
      vocab_size: number of token ids, V.
      embed: width of the residual stream, D.
      mlp: neurons of each feed-forward network, F.
      layers: number of blocks, L.
      heads: query heads, H; a multiple of `kv_heads`.
      kv_heads: key/value heads, K; each serves heads / kv_heads query heads.
      head_dim: width of a head, C; even, since rotary pairs are (i, i + C/2).
      tied: whether the embedding is also the unembedding.
      rope_theta: base of the rotary frequencies.
      rope_scaling: Llama 3 frequency scaling, or None.
      norm_eps: added to the mean square inside RMSNorm.
      context: longest sequence in tokens that the model is meant for.
    """

    vocab_size: int
    embed: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    context: int = 131_072

    def __post_init__(self) -> None:
        for name in ("vocab_size", "embed", "mlp", "layers", "heads", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"LlamaConfig.{name} is {getattr(self, name)}; it must be positive"
                )
        if self.heads % self.kv_heads:
            raise InputError(
                f"LlamaConfig.heads is {self.heads}, not a multiple of kv_heads {self.kv_heads}"
            )
        if self.head_dim % 2:
            raise InputError(f"LlamaConfig.head_dim is {self.head_dim}; rotary pairs need it even")

    @property
    def parameters(self) -> int:
        """Number of parameters; a tied matrix counts once."""
        return self.non_embedding_parameters + self.vocab_size * self.embed * (2 - self.tied)

    @property
    def non_embedding_parameters(self) -> int:
        """Number of parameters outside embedding and unembedding."""
        attention = self.embed * self.head_dim * 2 * (self.heads + self.kv_heads)
        block = attention + 3 * self.embed * self.mlp + 2 * self.embed
        return self.layers * block + self.embed

    def flops_per_token(self, context: int) -> float:
        """Forward floating-point operations a token, averaged over a causal row of `context`."""
        matrices = self.non_embedding_parameters + self.vocab_size * self.embed
        attention = 2 * self.layers * self.heads * self.head_dim * context / 2
        return 2 * (matrices + attention)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "LlamaConfig":
        """Builds a config from `to_json`'s object.

        Raises:
          InputError: a field is missing or unknown.
        """
        scaling = value.get("rope_scaling")
        try:
            return cls(
                **{**value, "rope_scaling": RopeScaling(**scaling) if scaling else None},
            )
        except TypeError as error:
            raise InputError(f"not a Llama config: {error}") from error
