"""Contenders on PyTorch. A weight is [V, D], as in torch.nn.Linear."""

import importlib
import os
import sys
import types

import numpy as np
import problem
import torch
import torch.nn.functional as F


def build(name: str, arrays: dict, site: str | None):
    """A function of no arguments that returns the loss and both gradients."""
    del site
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given = {}
    for key in list(arrays):
        value = _tensor(arrays.pop(key)).to(device)
        if "unembedding" in key:
            key, value = key.replace("unembedding", "weight"), value.t().contiguous()
        given[key] = value
    for key in ("labels", "ids"):
        if key in given:
            given[key] = given[key].long()
    wanted = [given.pop(key).requires_grad_() for key in ("hidden", "weight")]
    loss = _LOSSES[name]()
    # Shapes of an earlier, smaller problem would make this one's compiled shapes dynamic.
    torch._dynamo.reset()

    def run():
        value = loss(*wanted, given)
        hidden_bar, weight_bar = torch.autograd.grad(value, wanted)
        return value.detach(), hidden_bar, weight_bar.t()

    return run


def _tensor(array):
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _combined(log_q, kl_N, given):
    hard = F.nll_loss(log_q, given["labels"])
    return problem.HARD * hard + problem.SOFT * kl_N.mean()


def _dense(hidden, weight, given):
    log_q = F.log_softmax(F.linear(hidden, weight).float(), dim=-1)
    log_p = F.log_softmax(given["teacher_logits"].float(), dim=-1)
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return _combined(log_q, kl, given)


def _sparse(hidden, weight, given):
    log_q = F.log_softmax(F.linear(hidden, weight).float(), dim=-1)
    picked = log_q.gather(-1, given["ids"])
    rest = torch.log1p(-picked.exp().sum(-1))
    log_p, log_tail = given["log_probs"], given["log_tail"]
    kl = (log_p.exp() * (log_p - picked)).sum(-1) + log_tail.exp() * (log_tail - rest)
    return _combined(log_q, kl, given)


def _liger(chunk: int, compiled: bool):
    """Liger's generalised Jensen-Shannon head, which at beta 0 is forward KL."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    head = LigerFusedLinearJSDLoss(
        weight_hard_loss=problem.HARD,
        weight_soft_loss=problem.SOFT,
        beta=0.0,
        compiled=compiled,
        chunk_size=chunk,
    )

    def loss(hidden, weight, given):
        teacher = given["teacher_hidden"], given["teacher_weight"]
        return head(hidden, weight, *teacher, given["labels"])

    return loss


def _torchtune():
    """torchtune's chunked losses, loaded without its __init__, which needs torchao."""
    for package in ("torchtune", "torchtune.modules"):
        module = types.ModuleType(package)
        places = (f"{place}/{package.replace('.', '/')}" for place in sys.path)
        module.__path__ = [place for place in places if os.path.isdir(place)]
        sys.modules[package] = module
    chunked = importlib.import_module("torchtune.modules.loss")
    hard, soft = chunked.CEWithChunkedOutputLoss(), chunked.ForwardKLWithChunkedOutputLoss()

    def loss(hidden, weight, given):
        labels = given["labels"][None]
        student = [F.linear(part[None], weight) for part in hidden.chunk(8)]
        teacher = [part[None] for part in given["teacher_logits"].chunk(8)]
        return problem.HARD * hard(student, labels) + problem.SOFT * soft(student, teacher, labels)

    return loss


def _trl():
    """TRL's two chunked heads; its trainers use one or the other, never both."""
    from trl.kernels.chunked_divergence import VOCAB_CHUNK_SIZE, ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def loss(hidden, weight, given):
        teacher = given["teacher_hidden"], given["teacher_weight"], None
        kl = ChunkedDivergenceFunction.apply(hidden, weight, None, *teacher, 0.0)[0]
        log_prob = ChunkedLogProbFunction.apply(
            hidden, weight, None, given["labels"], 1.0, VOCAB_CHUNK_SIZE, None, 1.0, ()
        )[0]
        return (problem.SOFT * kl - problem.HARD * log_prob).mean()

    return loss


def _distillkit(hidden, weight, given):
    """DistillKit's sparse KL with a bucket for what is missing on both sides.

    Written from its published formula (it is on no package index): log-sum-exp and a gather, the
    missing mass as log(1 - e^x) with x held below -1e-6, next to cross-entropy on the same logits.
    """
    logits = F.linear(hidden, weight).float()
    hard = F.cross_entropy(logits, given["labels"])
    log_q = logits.gather(-1, given["ids"]) - torch.logsumexp(logits, -1, keepdim=True)
    log_p = given["log_probs"]
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    missing_p, missing_q = _log_missing(log_p), _log_missing(log_q)
    mass = missing_p.exp()
    kl = kl + torch.where(mass > 1e-6, mass * (missing_p - missing_q), torch.zeros_like(mass))
    return problem.HARD * hard + problem.SOFT * kl.mean()


def _log_missing(log_probs):
    total = torch.logsumexp(log_probs.float(), dim=-1).clamp(max=-1e-6)
    near = total > -1
    missing = torch.empty_like(total)
    missing[near] = torch.log(-torch.expm1(total[near]))
    missing[~near] = torch.log1p(-torch.exp(total[~near]))
    return missing


_LOSSES = {
    "torch-dense": lambda: _dense,
    "torch-sparse": lambda: _sparse,
    "torch-compile-dense": lambda: torch.compile(_dense),
    "torch-compile-sparse": lambda: torch.compile(_sparse),
    "liger-256": lambda: _liger(256, False),
    "liger-256-compile": lambda: _liger(256, True),
    "liger-1024": lambda: _liger(1024, False),
    "liger-1024-compile": lambda: _liger(1024, True),
    "torchtune-dense": _torchtune,
    "trl-chunked": _trl,
    "distillkit-sparse": lambda: _distillkit,
}
