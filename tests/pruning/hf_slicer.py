"""Pruning on Hugging Face's tensors by loops over rows and columns: the oracle of surgery.

It shares no code with the package: what is kept is found anew from the scores, and rotary pairs by
comparing frequencies one by one.
"""

import math

import numpy as np


def best(scores, count):
    """The indices of the highest scores, ascending."""
    return sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:count])


def kept_channels(source, target):
    """Rows of a head that a target's head keeps: pair j turns channel j and channel j + C'/2."""
    rows = []
    for channel in range(target.head_dim):
        half, pair = divmod(channel, target.head_dim // 2)
        wanted = target.rope_theta ** (-2 * pair / target.head_dim)
        (found,) = (
            p
            for p in range(source.head_dim // 2)
            if math.isclose(source.rope_theta ** (-2 * p / source.head_dim), wanted, rel_tol=1e-9)
        )
        rows.append(found + half * (source.head_dim // 2))
    return rows


def kept_heads(scores, kv_heads, source, target):
    """The best query heads of each kept key/value head."""
    old, new = source.heads // source.kv_heads, target.heads // target.kv_heads
    return [k * old + i for k in kv_heads for i in best(scores[k * old : (k + 1) * old], new)]


def scaled(weight, power, embed):
    """A norm's weight on kept channels, times the share of the root mean square they hold."""
    return weight[embed] * math.sqrt(np.mean(power[embed]) / np.mean(power))


def prune(tensors, scores, source, target):
    """The target's tensors by name."""
    embed = best(scores.embed, target.embed)
    channels = kept_channels(source, target)
    out = {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"][:, embed]}
    for new, old in enumerate(best(scores.layers, target.layers)):
        kv_heads = best(scores.kv_heads[old], target.kv_heads)
        heads = kept_heads(scores.heads[old], kv_heads, source, target)
        query = [head * source.head_dim + channel for head in heads for channel in channels]
        key = [head * source.head_dim + channel for head in kv_heads for channel in channels]
        mlp = best(scores.mlp[old], target.mlp)

        def of(name, layer=old):
            return tensors[f"model.layers.{layer}.{name}.weight"].astype(np.float64)

        layer = {
            "input_layernorm": scaled(of("input_layernorm"), scores.attention_power[old], embed),
            "self_attn.q_proj": of("self_attn.q_proj")[query][:, embed]
            * math.sqrt(target.head_dim / source.head_dim),
            "self_attn.k_proj": of("self_attn.k_proj")[key][:, embed],
            "self_attn.v_proj": of("self_attn.v_proj")[key][:, embed],
            "self_attn.o_proj": of("self_attn.o_proj")[embed][:, query],
            "post_attention_layernorm": scaled(
                of("post_attention_layernorm"), scores.mlp_power[old], embed
            ),
            "mlp.gate_proj": of("mlp.gate_proj")[mlp][:, embed],
            "mlp.up_proj": of("mlp.up_proj")[mlp][:, embed],
            "mlp.down_proj": of("mlp.down_proj")[embed][:, mlp],
        }
        out |= {f"model.layers.{new}.{name}.weight": value for name, value in layer.items()}
    out["model.norm.weight"] = scaled(tensors["model.norm.weight"], scores.final_power, embed)
    if not target.tied:
        out["lm_head.weight"] = tensors["lm_head.weight"][:, embed]
    return out
