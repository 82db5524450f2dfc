import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from distill_jax.models import Sampling
from distill_jax.models.sampling import draw, truncate


def nucleus(logits, top_p):
    """Which tokens stay, by sorting in float64; ties with the last one that stays stay."""
    share = scipy.special.softmax(logits.astype(np.float64))
    order = np.argsort(-logits, kind="stable")
    before = np.cumsum(share[order]) - share[order]
    return logits >= logits[order[before < top_p]].min()


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_the_nucleus_is_what_sorting_gives(top_p):
    random = np.random.default_rng(0)
    rows = random.normal(0, 3, (64, 501)).astype(np.float32)
    rows[:16] = np.round(rows[:16])  # many ties, zeros of both signs among them
    rows[16:32, ::3] = -np.inf
    rows[32:40] *= 1e4
    rows[40:48] *= 1e-30
    cut = np.asarray(truncate(jnp.asarray(rows), Sampling(top_p=top_p)))
    for row, found in zip(rows, cut):
        np.testing.assert_array_equal(found, np.where(nucleus(row, top_p), row, -np.inf))


@pytest.mark.slow
@pytest.mark.parametrize("min_p", [0.01, 0.2, 1.0])
def test_cuts_are_those_of_transformers(min_p):
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers").generation.logits_process
    logits = np.random.default_rng(1).normal(0, 2, (8, 300)).astype(np.float32)
    theirs = torch.tensor(logits) / 1.7
    for cut in (
        process.TopKLogitsWarper(100),
        process.TopPLogitsWarper(0.9),
        process.MinPLogitsWarper(min_p),
    ):
        theirs = cut(None, theirs)
    sampling = Sampling(temperature=1.7, top_k=100, top_p=0.9, min_p=min_p)
    ours = truncate(jnp.asarray(logits) / 1.7, sampling)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)


def test_the_most_probable_token_is_the_first_of_equals():
    logits = jnp.array([[1.0, 3.0, 3.0], [-jnp.inf, -1e4, -2e4], [2.0, 0.0, 2.0]])
    keys = jax.vmap(jax.random.key)(jnp.arange(3))
    assert draw(logits, keys, Sampling(temperature=0.0)).tolist() == [1, 1, 0]
