"""A Llama in float64 NumPy, written for reading, whose parts can be masked: the oracle.

It shares no code with the package. A mask keeps every array at its full size: a dropped layer is
skipped, dropped heads, neurons and head channels are multiplied by zero, dropped residual
channels are zero everywhere and left out of the mean of every RMSNorm.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass
class Masks:
    layers: np.ndarray  # [L] bool
    embed: np.ndarray  # [D] bool
    head_dim: np.ndarray  # [C] bool
    mlp: np.ndarray  # [L, F] bool
    heads: np.ndarray  # [L, H] bool
    attention_scale: np.ndarray  # [L], factor of the norm's weight
    mlp_scale: np.ndarray  # [L]
    final_scale: float

    @classmethod
    def full(cls, config):
        c = config
        return cls(
            layers=np.ones(c.layers, bool),
            embed=np.ones(c.embed, bool),
            head_dim=np.ones(c.head_dim, bool),
            mlp=np.ones((c.layers, c.mlp), bool),
            heads=np.ones((c.layers, c.heads), bool),
            attention_scale=np.ones(c.layers),
            mlp_scale=np.ones(c.layers),
            final_scale=1.0,
        )

    @classmethod
    def of_plan(cls, plan):
        masks = cls.full(plan.source)
        masks.layers[:] = masks.embed[:] = masks.head_dim[:] = False
        masks.mlp[:] = masks.heads[:] = False
        masks.layers[plan.layers] = True
        masks.embed[plan.embed] = True
        masks.head_dim[plan.head_dim] = True
        for new, old in enumerate(plan.layers):
            masks.mlp[old, plan.mlp[new]] = True
            masks.heads[old, plan.heads[new]] = True
            masks.attention_scale[old] = plan.norm_scales["attention"][new]
            masks.mlp_scale[old] = plan.norm_scales["mlp"][new]
        masks.final_scale = float(plan.norm_scales["final"][0])
        return masks


def frequencies(config):
    c = config
    result = []
    for pair in range(c.head_dim // 2):
        frequency = c.rope_theta ** (-2 * pair / c.head_dim)
        scaling = c.rope_scaling
        if scaling is not None:
            wavelength = 2 * np.pi / frequency
            if wavelength > scaling.original_context / scaling.low_frequency_factor:
                frequency /= scaling.factor
            elif wavelength > scaling.original_context / scaling.high_frequency_factor:
                smooth = (scaling.original_context / wavelength - scaling.low_frequency_factor) / (
                    scaling.high_frequency_factor - scaling.low_frequency_factor
                )
                frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        result.append(frequency)
    return np.array(result)


def rotate(x, positions, config):
    """Rotates x [T, heads, C]: channel i with channel i + C/2."""
    half = config.head_dim // 2
    angle = positions[:, None, None] * frequencies(config)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate(
        (
            first * np.cos(angle) - second * np.sin(angle),
            second * np.cos(angle) + first * np.sin(angle),
        ),
        axis=-1,
    )


def row_activations(config, params, tokens, segments, masks=None):
    """Activations of one row: a list of dicts, one a kept layer, and the final hidden states."""
    masks = masks or Masks.full(config)
    p = {k: v for k, v in params.items() if k != "layers"}
    layers = params["layers"]
    group = config.heads // config.kv_heads

    def norm(x, weight, scale):
        mean_square = (x[:, masks.embed] ** 2).mean(-1, keepdims=True)
        return x / np.sqrt(mean_square + config.norm_eps) * f64(weight) * scale * masks.embed

    time = len(tokens)
    positions = np.array(
        [
            t - min(s for s in range(t + 1) if (segments[s : t + 1] == segments[t]).all())
            for t in range(time)
        ]
    )
    allowed = (segments[:, None] == segments[None, :]) & np.tri(time, dtype=bool)
    x = f64(p["embedding"])[tokens] * masks.embed
    seen = []
    for i in np.flatnonzero(masks.layers):
        attention = {k: f64(v)[i] for k, v in layers["attention"].items()}
        mlp = {k: f64(v)[i] for k, v in layers["mlp"].items()}
        layer = {"residual_in": x}
        h = layer["attention_input"] = norm(x, attention["norm"], masks.attention_scale[i])
        query = rotate(np.einsum("td,dhc->thc", h, attention["query"]), positions, config)
        key = rotate(np.einsum("td,dkc->tkc", h, attention["key"]), positions, config)
        value = np.einsum("td,dkc->tkc", h, attention["value"]) * masks.head_dim
        query, key = query * masks.head_dim, key * masks.head_dim
        heads = np.zeros_like(query)
        for head in range(config.heads):
            score = query[:, head] @ key[:, head // group].T / np.sqrt(config.head_dim)
            score = np.where(allowed, score, -np.inf)
            weight = np.exp(score - score.max(-1, keepdims=True))
            weight /= weight.sum(-1, keepdims=True)
            heads[:, head] = weight @ value[:, head // group] * masks.heads[i, head]
        layer["heads"] = heads
        x = x + np.einsum("thc,hcd->td", heads, attention["output"]) * masks.embed
        h = layer["mlp_input"] = norm(x, mlp["norm"], masks.mlp_scale[i])
        gate = h @ mlp["gate"]
        neurons = gate / (1 + np.exp(-gate)) * (h @ mlp["up"]) * masks.mlp[i]
        layer["neurons"] = neurons
        x = x + neurons @ mlp["down"] * masks.embed
        layer["residual_out"] = x
        seen.append(layer)
    return seen, norm(x, p["final_norm"], masks.final_scale)


def logits(config, params, tokens, segments, masks=None, *, tied):
    """Logits [B, T, V]; `tied` says which matrix is the unembedding."""
    matrix = f64(params["embedding"]).T if tied else f64(params["unembedding"])
    rows = [row_activations(config, params, t, s, masks)[1] for t, s in zip(tokens, segments)]
    return np.stack(rows) @ matrix


def f64(x):
    return np.asarray(x, np.float64)
