"""The problem every contender solves, and its answer in float64 NumPy.

The loss is 0.4 * cross-entropy + 0.6 * forward KL, a mean over tokens (cross-entropy alone for the
objective "labels"); wanted are the loss and the gradients of hidden states and unembedding.
"""

import dataclasses

import numpy as np

HARD, SOFT = 0.4, 0.6


@dataclasses.dataclass(frozen=True)
class Shape:
    tokens: int
    embed: int
    vocab: int
    ids: int


CHECK = Shape(tokens=512, embed=32, vocab=1000, ids=16)
"""Small, and still more than one chunk for peers that take 256 tokens at a time."""


def make(shape: Shape, teacher: str, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Inputs with a fixed seed.

    Args:
      shape: how large.
      teacher: "logits" adds an array [N, V]; "head" adds the hidden states and the unembedding
        that it is the product of; "topk" adds ids, their log-probabilities and the tail's;
        "none" adds nothing.
      dtype: of hidden states, unembeddings and a teacher's logits.
    """
    N, D, V, K = dataclasses.astuple(shape)
    arrays = {
        "hidden": _random(0, 2.0, N, D),
        "unembedding": _random(1, D**-0.5, D, V),
        "labels": np.random.default_rng(2).integers(0, V, N, dtype=np.int32),
    }
    if teacher in ("logits", "head"):
        arrays["teacher_hidden"] = _random(3, 2.0, N, D)
        arrays["teacher_unembedding"] = _random(4, D**-0.5, D, V)
    if teacher == "logits":
        hidden, unembedding = arrays.pop("teacher_hidden"), arrays.pop("teacher_unembedding")
        arrays["teacher_logits"] = hidden @ unembedding
    for name, array in arrays.items():
        if name != "labels":
            arrays[name] = array.astype(np.dtype(dtype), copy=False)
    if teacher == "topk":
        arrays.update(_topk(N, V, K))
    return arrays


def _random(seed: int, scale: float, *shape: int) -> np.ndarray:
    """Uniform numbers of standard deviation `scale`: quicker to draw than normal ones."""
    values = np.random.default_rng(seed).random(shape, np.float32)
    values -= np.float32(0.5)
    values *= np.float32(scale * 12**0.5)
    return values


def _topk(N: int, V: int, K: int) -> dict[str, np.ndarray]:
    """K distinct ids per token, one from each K-th of the vocabulary, in a shuffled order."""
    random = np.random.default_rng(5)
    ids = random.integers(0, V // K, (N, K)) + np.arange(K) * (V // K)
    scores = 2.0 * random.standard_normal((N, K + 1))
    log_probs = scores - _logsumexp(scores)
    return {
        "ids": random.permuted(ids, axis=1).astype(np.int32),
        "log_probs": log_probs[:, :K].astype(np.float32),
        "log_tail": log_probs[:, K].astype(np.float32),
    }


def answer(objective: str, arrays: dict[str, np.ndarray]) -> tuple[float, np.ndarray, np.ndarray]:
    """The loss and both gradients in float64.

    Args:
      objective: "labels", "dense", "sparse" (K ids and a bucket for the others), or "renormalised"
        (teacher and student both rescaled to sum to one over the K ids).
      arrays: what `make` gave.
    """
    hidden, unembedding = (arrays[name].astype(np.float64) for name in ("hidden", "unembedding"))
    logits = hidden @ unembedding
    log_q = logits - _logsumexp(logits)
    q, rows = np.exp(log_q), np.arange(len(logits))
    loss = -log_q[rows, arrays["labels"]]
    slope = q.copy()
    slope[rows, arrays["labels"]] -= 1.0
    if objective != "labels":
        soft, soft_slope = _SOFT[objective](log_q, arrays)
        loss, slope = HARD * loss + SOFT * soft, HARD * slope + SOFT * soft_slope
    slope /= len(logits)
    return float(loss.mean()), slope @ unembedding.T, hidden.T @ slope


def _dense(log_q, arrays):
    teacher = arrays["teacher_logits"].astype(np.float64)
    log_p = teacher - _logsumexp(teacher)
    p = np.exp(log_p)
    return (p * (log_p - log_q)).sum(-1), np.exp(log_q) - p


def _sparse(log_q, arrays):
    ids, log_p, log_tail = arrays["ids"], arrays["log_probs"], arrays["log_tail"]
    q, p, tail = np.exp(log_q), np.exp(log_p, dtype=np.float64), np.exp(log_tail, dtype=np.float64)
    rest = 1.0 - np.take_along_axis(q, ids, 1).sum(-1)
    loss = (p * (log_p - np.take_along_axis(log_q, ids, 1))).sum(-1)
    slope = q * (1.0 - tail / rest)[:, None]
    np.put_along_axis(slope, ids, np.take_along_axis(q, ids, 1) - p, 1)
    return loss + tail * (log_tail - np.log(rest)), slope


def _renormalised(log_q, arrays):
    ids = arrays["ids"]
    log_p = arrays["log_probs"] - _logsumexp(arrays["log_probs"].astype(np.float64))
    picked = np.take_along_axis(log_q, ids, 1)
    picked = picked - _logsumexp(picked)
    p = np.exp(log_p)
    slope = np.zeros_like(log_q)
    np.put_along_axis(slope, ids, np.exp(picked) - p, 1)
    return (p * (log_p - picked)).sum(-1), slope


_SOFT = {"dense": _dense, "sparse": _sparse, "renormalised": _renormalised}


def teacher_entropy(arrays: dict[str, np.ndarray]) -> float:
    """Mean entropy of a dense teacher: the constant that some peers leave out of their KL."""
    teacher = arrays["teacher_logits"].astype(np.float64)
    log_p = teacher - _logsumexp(teacher)
    return float(-(np.exp(log_p) * log_p).sum(-1).mean())


def _logsumexp(values: np.ndarray) -> np.ndarray:
    top = values.max(-1, keepdims=True)
    return top + np.log(np.exp(values - top).sum(-1, keepdims=True))
