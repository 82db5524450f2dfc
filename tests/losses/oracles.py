"""Float64 NumPy and SciPy: the definitions, written as in the papers, one token at a time."""

import jax.numpy as jnp
import numpy as np
import scipy.special

from distill_jax import losses

DIVERGENCES = {
    "forward_kl": {},
    "reverse_kl": {},
    "jensen_shannon": {"beta": 0.3},
    "skewed_forward_kl": {"alpha": 0.1},
    "skewed_reverse_kl": {"alpha": 0.2},
    "alpha_beta_divergence": {"alpha": 0.2, "beta": 0.7},
    "adaptive_kl": {"head_mass": 0.5},
    "total_variation": {},
}


def loss(name, **overrides):
    """Our divergence with the parameters under which it is tested."""
    kwargs = {**DIVERGENCES[name], **overrides}
    return lambda student, teacher, **more: getattr(losses, name)(
        student, teacher, **kwargs, **more
    )


def softmax(logits, temperature=1.0):
    return scipy.special.softmax(np.asarray(logits, np.float64) / temperature, axis=-1)


def kl(p, q):
    return scipy.special.rel_entr(p, q).sum(-1)


def adaptive_kl(p, q, head_mass):
    """By sorting and walking, token by token."""
    values = []
    for p_V, q_V in zip(p.reshape(-1, p.shape[-1]), q.reshape(-1, q.shape[-1]), strict=True):
        head, mass = [], 0.0
        for index in np.argsort(-p_V):
            if mass >= head_mass:
                break
            head.append(index)
            mass += p_V[index]
        gap = np.abs(p_V - q_V)
        weight = gap[head].sum() / gap.sum()
        values.append(weight * kl(p_V, q_V) + (1 - weight) * kl(q_V, p_V))
    return np.reshape(values, p.shape[:-1])


def divergence(name, p, q):
    """Value of a divergence between distributions [..., outcomes], at temperature 1."""
    a, b = DIVERGENCES[name].get("alpha"), DIVERGENCES[name].get("beta")
    match name:
        case "forward_kl":
            return kl(p, q)
        case "reverse_kl":
            return kl(q, p)
        case "jensen_shannon":
            return b * kl(p, b * p + (1 - b) * q) + (1 - b) * kl(q, b * p + (1 - b) * q)
        case "skewed_forward_kl":
            return kl(p, a * p + (1 - a) * q)
        case "skewed_reverse_kl":
            return kl(q, (1 - a) * p + a * q)
        case "alpha_beta_divergence":
            inside = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
            return -inside.sum(-1) / (a * b)
        case "adaptive_kl":
            return adaptive_kl(p, q, DIVERGENCES[name]["head_mass"])
        case "total_variation":
            return np.abs(p - q).sum(-1) / 2


def bucketed(distribution, ids):
    """Probabilities [..., K + 1] of some ids and of all others together."""
    picked = np.take_along_axis(distribution, np.asarray(ids), -1)
    rest = distribution.copy()
    np.put_along_axis(rest, np.asarray(ids), 0.0, -1)
    return np.concatenate([picked, rest.sum(-1, keepdims=True)], -1)


def top_k(teacher_logits, k, temperature=1.0):
    """TopKTargets of some logits, computed in float64, and their ids."""
    p = softmax(teacher_logits, temperature)
    ids = np.argsort(-p, axis=-1)[..., :k]
    with np.errstate(divide="ignore"):
        logs = np.log(bucketed(p, ids))
    targets = losses.TopKTargets(
        jnp.asarray(ids, jnp.int32),
        jnp.asarray(logs[..., :-1], jnp.float32),
        jnp.asarray(logs[..., -1], jnp.float32),
        temperature,
    )
    return targets, ids


def sampled(teacher_logits, draws, rng, temperature=1.0):
    """SampledTargets from draws with replacement: an id may come more than once."""
    p = softmax(teacher_logits, temperature)
    flat = p.reshape(-1, p.shape[-1])
    ids = np.stack([rng.choice(flat.shape[-1], size=draws, p=row) for row in flat])
    ids = ids.reshape(*p.shape[:-1], draws)
    weights = np.full(ids.shape, 1.0 / draws, np.float32)
    return losses.SampledTargets(jnp.asarray(ids, jnp.int32), jnp.asarray(weights), temperature)
