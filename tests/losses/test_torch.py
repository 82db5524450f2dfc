"""Gradients against PyTorch's autograd in float64, on the definitions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import losses

from . import oracles

pytestmark = pytest.mark.slow
N, V = 6, 13


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(size=(2, N, V)) * 2


def definition(name, p, q):
    a, b = oracles.DIVERGENCES[name].get("alpha"), oracles.DIVERGENCES[name].get("beta")

    def kl(p, q):
        return (p * (p / q).log()).sum(-1)

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
            values = oracles.adaptive_kl(p.numpy(), q.detach().numpy(), 0.5)
            forward, reverse = kl(p, q), kl(q, p)
            weight = (p.new_tensor(values) - reverse.detach()) / (forward - reverse).detach()
            return weight * forward + (1 - weight) * reverse
        case "total_variation":
            return (p - q).abs().sum(-1) / 2


CASES = [(name, kind) for name in sorted(oracles.DIVERGENCES) for kind in ("dense", "top_k")]
CASES.remove(("adaptive_kl", "top_k"))  # the oracle's head does not know of the bucket


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_gradient_equals_autograd(name, kind, logits, torch):
    temperature = 1.7
    student = torch.tensor(logits[0], requires_grad=True)
    p = torch.softmax(torch.tensor(logits[1]) / temperature, -1)
    q = torch.softmax(student / temperature, -1)
    teacher = jnp.asarray(logits[1], jnp.float32)
    if kind == "top_k":
        teacher, ids = oracles.top_k(logits[1], 4, temperature)
        listed = torch.zeros(N, V).scatter(-1, torch.tensor(ids), 1.0).bool()

        def bucketed(x):
            rest = torch.where(listed, 0.0, x).sum(-1, keepdim=True)
            return torch.cat([x.gather(-1, torch.tensor(ids)), rest], -1)

        p, q = bucketed(p), bucketed(q)
    (temperature**2 * definition(name, p, q)).sum().backward()

    def loss(student):
        return oracles.loss(name)(student, teacher, temperature=temperature).sum()

    slope = jax.grad(loss)(jnp.asarray(logits[0], jnp.float32))
    np.testing.assert_allclose(slope, student.grad.numpy(), rtol=2e-4, atol=2e-5)


def test_forward_kl_equals_kl_div(logits, torch):
    student, teacher = torch.tensor(logits)
    expected = torch.nn.functional.kl_div(
        torch.log_softmax(student, -1),
        torch.log_softmax(teacher, -1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    value = losses.forward_kl(*jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(value, expected.numpy(), rtol=1e-5)


def test_fused_head_equals_autograd(logits, torch):
    rng = np.random.default_rng(1)
    hidden, unembedding = rng.normal(size=(N, 4)), rng.normal(size=(4, V))
    labels = rng.integers(0, V, N)
    where = np.asarray([1.0, 0.0, 1.0, 0.5, 1.0, 1.0])
    sides = [torch.tensor(side, requires_grad=True) for side in (hidden, unembedding)]
    q = torch.log_softmax(sides[0] @ sides[1], -1)
    p = torch.softmax(torch.tensor(logits[1]), -1)
    loss = -0.3 * q[torch.arange(N), torch.tensor(labels)] + 0.7 * (p * (p.log() - q)).sum(-1)
    mean = (loss * torch.tensor(where)).sum() / where.sum()
    mean.backward()

    objective = losses.weighted_sum(
        hard=(0.3, losses.hard_labels()), soft=(0.7, losses.distill("8b", losses.forward_kl))
    )
    targets = {"labels": jnp.asarray(labels), "8b": jnp.asarray(logits[1], jnp.float32)}

    def fused(hidden, unembedding):
        return losses.fused_linear(
            objective, hidden, unembedding, targets, jnp.asarray(where), chunk=4
        ).mean()[0]

    value, slopes = jax.value_and_grad(fused, argnums=(0, 1))(
        jnp.asarray(hidden, jnp.float32), jnp.asarray(unembedding, jnp.float32)
    )
    np.testing.assert_allclose(value, mean.item(), rtol=1e-5)
    chex.assert_trees_all_close(
        slopes, tuple(side.grad.numpy() for side in sides), rtol=1e-4, atol=1e-5
    )
