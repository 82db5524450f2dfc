"""Contenders on JAX. Each builder compiles ahead of time and returns what runs once."""

import functools
import importlib
import sys
import types

import jax
import jax.numpy as jnp
import problem


def build(name: str, arrays: dict, site: str | None):
    """A function of no arguments that returns the loss and both gradients."""
    loss = _tunix(site) if name == "tunix-dense" else _LOSSES[name]
    arrays = {key: jax.device_put(value) for key, value in arrays.items()}
    wanted = (arrays.pop("hidden"), arrays.pop("unembedding"))

    def step(wanted, given):
        value, slopes = jax.value_and_grad(lambda both: loss(*both, given))(wanted)
        return value, *slopes

    compiled = jax.jit(step).lower(wanted, arrays).compile()

    def run():
        return jax.block_until_ready(compiled(wanted, arrays))

    memory = compiled.memory_analysis()
    run.planned_bytes = memory.temp_size_in_bytes + memory.output_size_in_bytes
    return run


def floor(shape: problem.Shape, dtype: str = "float32"):
    """The three products on a tile of the vocabulary, and how many tiles there are."""
    tile = min(shape.vocab, 16384)
    arrays = problem.make(problem.Shape(shape.tokens, shape.embed, tile, 1), "logits", dtype)
    hidden, unembedding, slope = (
        jax.device_put(arrays[name]) for name in ("hidden", "unembedding", "teacher_logits")
    )
    products = (
        ("nd,dv->nv", hidden, unembedding),
        ("nv,dv->nd", slope, unembedding),
        ("nd,nv->dv", hidden, slope),
    )
    runs = []
    for subscripts, left, right in products:
        compiled = jax.jit(functools.partial(jnp.einsum, subscripts)).lower(left, right).compile()
        runs.append(functools.partial(compiled, left, right))
    return [lambda run=run: jax.block_until_ready(run()) for run in runs], shape.vocab / tile


def _ours(objective, targets):
    def loss(hidden, unembedding, given):
        from distill_jax import losses

        return losses.fused_linear(objective(), hidden, unembedding, targets(given)).mean()[0]

    return loss


def _hard_and_kl():
    from distill_jax import losses

    return losses.weighted_sum(
        hard=(problem.HARD, losses.hard_labels()),
        kl=(problem.SOFT, losses.distill("teacher", losses.forward_kl)),
    )


def _hard():
    from distill_jax import losses

    return losses.hard_labels()


def _topk(given):
    from distill_jax import losses

    teacher = losses.TopKTargets(given["ids"], given["log_probs"], given["log_tail"])
    return {"labels": given["labels"], "teacher": teacher}


def _logits(hidden, unembedding):
    return jnp.matmul(hidden, unembedding, preferred_element_type=jnp.float32)


def _naive_dense(hidden, unembedding, given):
    log_q = jax.nn.log_softmax(_logits(hidden, unembedding))
    log_p = jax.nn.log_softmax(given["teacher_logits"].astype(jnp.float32))
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    return jnp.mean(problem.HARD * _nll(log_q, given) + problem.SOFT * kl)


def _naive_sparse(hidden, unembedding, given):
    log_q = jax.nn.log_softmax(_logits(hidden, unembedding))
    picked = jnp.take_along_axis(log_q, given["ids"], axis=-1)
    rest = jnp.log1p(-jnp.sum(jnp.exp(picked), axis=-1))
    kl = jnp.sum(jnp.exp(given["log_probs"]) * (given["log_probs"] - picked), axis=-1)
    kl = kl + jnp.exp(given["log_tail"]) * (given["log_tail"] - rest)
    return jnp.mean(problem.HARD * _nll(log_q, given) + problem.SOFT * kl)


def _nll(log_q, given):
    return -jnp.take_along_axis(log_q, given["labels"][:, None], axis=-1)[:, 0]


def _maxtext(hidden, unembedding, given):
    """MaxText's loss on stored top-k logits: both sides are rescaled to the K ids."""
    import optax

    logits = _logits(hidden, unembedding)
    one_hot = jax.nn.one_hot(given["labels"], logits.shape[-1])
    log_q = jax.nn.log_softmax(jnp.take_along_axis(logits, given["ids"], axis=-1))
    log_p = jax.nn.log_softmax(given["log_probs"])
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    hard = optax.softmax_cross_entropy(logits=logits, labels=one_hot)
    return problem.HARD * jnp.mean(hard) + problem.SOFT * jnp.mean(kl)


def _tunix(site: str | None):
    """Tunix's own strategy, loaded without the __init__ files that would import its trainers."""
    for package in ("tunix", "tunix.distillation", "tunix.distillation.strategies"):
        module = types.ModuleType(package)
        module.__path__ = [f"{site}/{package.replace('.', '/')}"]
        sys.modules[package] = module
    logit = importlib.import_module("tunix.distillation.strategies.logit")

    def labels(hidden, given):
        return jax.nn.one_hot(given["labels"], given["teacher_logits"].shape[-1])

    strategy = logit.LogitStrategy(
        student_forward_fn=lambda unembedding, hidden, given: hidden @ unembedding,
        teacher_forward_fn=lambda unembedding, hidden, given: given["teacher_logits"],
        labels_fn=labels,
        temperature=1.0,
        alpha=problem.SOFT,
    )

    def loss(hidden, unembedding, given):
        inputs = {"hidden": hidden, "given": given}
        return strategy.get_train_loss(unembedding, given["teacher_logits"], inputs)[0]

    return loss


_LOSSES = {
    "ours-dense": _ours(
        _hard_and_kl, lambda given: {"labels": given["labels"], "teacher": given["teacher_logits"]}
    ),
    "ours-sparse": _ours(_hard_and_kl, _topk),
    "ours-labels": _ours(_hard, lambda given: {"labels": given["labels"]}),
    "jax-dense": _naive_dense,
    "jax-sparse": _naive_sparse,
    "maxtext-topk": _maxtext,
}
