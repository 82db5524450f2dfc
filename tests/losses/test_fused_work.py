"""What the fused head makes: never all logits, and no gradient where none is asked for."""

import re

import jax
import jax.extend
import numpy as np
import pytest

from distill_jax import losses

from .test_fused import N, V, fused, inputs, unfused

SPARSE = losses.weighted_sum(
    hard=(0.3, losses.hard_labels()),
    top_k=(0.3, losses.distill("top_k", losses.reverse_kl)),
    sampled=(0.4, losses.distill("sampled", losses.forward_kl)),
)


def only_sparse():
    hidden, unembedding, targets, where, step = inputs()
    targets = {name: targets[name] for name in ("labels", "top_k", "sampled")}
    return hidden, unembedding, targets, where, step


def _shapes(jaxpr):
    """Shapes of everything that a computation makes, inner ones included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _shapes(inner)


@pytest.mark.parametrize("differentiate", [False, True])
def test_never_holds_all_logits(differentiate):
    arrays = only_sparse()

    def loss(hidden, unembedding, targets, where, step):
        return fused(SPARSE, hidden, unembedding, targets, where, step).loss

    def whole(hidden, unembedding, targets, where, step):
        return unfused(SPARSE, hidden, unembedding, targets, where, step).loss

    def largest(function):
        function = jax.grad(function, argnums=(0, 1)) if differentiate else function
        shapes = list(_shapes(jax.make_jaxpr(function)(*arrays).jaxpr))
        return max(int(np.prod(shape)) for shape in shapes if V in shape)

    assert largest(whole) == N * V  # the search sees logits where there are some
    assert largest(loss) == 16 * V


def _vocabulary_products(function, arrays):
    jaxpr = str(jax.make_jaxpr(function)(*arrays))
    return len(re.findall(r"dot_general", jaxpr))


def test_evaluation_computes_no_gradient():
    arrays = only_sparse()

    def loss(hidden, unembedding, *rest):
        return fused(SPARSE, hidden, unembedding, *rest).loss

    assert _vocabulary_products(loss, arrays) == 1
    assert _vocabulary_products(jax.grad(loss, argnums=(0, 1)), arrays) == 3
