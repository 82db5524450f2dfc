import dataclasses

import jax
import numpy as np
import pytest

from distill_jax import models, teachers
from distill_jax.artifacts import InputError
from distill_jax.teachers import manifest
from distill_jax.teachers.verify import total_variation

from .known import ListCorpus, make_corpus

SCHEMES = {
    "top": teachers.TopK(k=6),
    "random": teachers.RandomSampling(draws=20),
    "threshold": teachers.Threshold(tau=0.04),
    "fixed": teachers.Threshold(ids=9),
}


def llama(seed):
    config = models.LlamaConfig(
        vocab_size=300, embed=16, mlp=32, layers=2, heads=2, kv_heads=1, head_dim=8, tied=True
    )
    # Far larger than at initialisation, so that the teacher has opinions.
    params = jax.tree.map(lambda x: 8 * x, models.init_params(config, jax.random.key(seed)))
    return models.Model(config, params)


@pytest.fixture(scope="module")
def model():
    return llama(0)


@pytest.fixture(scope="module")
def corpus():
    packed = make_corpus(6)
    for tokens, segment_ids in packed.rows:
        segment_ids[4:] *= 2
        tokens[0] = 1
    return packed


@pytest.fixture(scope="module")
def stores(tmp_path_factory, model, corpus):
    root = tmp_path_factory.mktemp("stores")
    directories = {name: root / name for name in SCHEMES}
    config = teachers.WriteConfig(batch_rows=4, rows_per_shard=4, chunk_tokens=16)
    teachers.write_stores(directories, SCHEMES, model, corpus, config=config)
    return directories


@pytest.mark.slow
def test_a_llama_says_what_its_logits_say(stores, model, corpus):
    """Packed documents included: the oracle is the model on each document alone."""
    store = teachers.open_store(stores["top"])
    for row in (0, 5):
        tokens, segment_ids = corpus.rows[row]
        targets = store[row]["targets"]
        for segment in (1, 2):
            place = np.flatnonzero(segment_ids == segment)
            logits = models.logits(model.config, model.params, tokens[None, place])[0]
            log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)
            stored = np.take_along_axis(log_probs, targets["ids"][place], axis=-1)
            np.testing.assert_allclose(targets["log_probs"][place], stored, atol=5e-4)
            assert (targets["ids"][place, 0] == log_probs.argmax(axis=-1)).mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SCHEMES))
def test_what_the_teacher_said_it_says_again(stores, model, corpus, name):
    figures = teachers.verify(stores[name], corpus, model, sample=4)
    assert figures["rows"] == 6
    assert figures["sampled_rows"] == 4
    assert figures["same_tokens"] > 0.9
    assert figures["total_variation"] < 1e-3


def test_another_teacher_or_corpus_is_refused(stores, model, corpus):
    with pytest.raises(InputError, match=r"written by teacher .*, not by"):
        teachers.verify(stores["top"], corpus, llama(1))
    with pytest.raises(InputError, match="corpus corpus-a, not for corpus-b"):
        teachers.verify(stores["top"], dataclasses.replace(corpus, fingerprint="corpus-b"), model)


@pytest.mark.parametrize("places", [(0, 1, 2, 3, 5, 4), (0, 1, 2, 3, 4)])
def test_other_rows_under_the_same_fingerprint_are_refused_without_the_teacher(
    stores, corpus, places
):
    assert teachers.verify(stores["top"], corpus)["rows"] == 6
    other = ListCorpus([corpus.rows[place] for place in places])
    expected = "has 6 rows, the corpus 5"
    if len(places) == 6:
        expected = f"row 4 is {corpus[4]['key']}, the corpus's is {corpus[5]['key']}"
    with pytest.raises(InputError, match=f"top: {expected}"):
        teachers.verify(stores["top"], other)


@pytest.mark.slow
def test_targets_the_teacher_never_said_are_refused(tmp_path, model, corpus):
    """Stores that are whole and well-formed, written with another forward pass."""

    def forgetful(config, params, tokens, segment_ids):
        return params["embedding"][tokens]

    directories = {name: tmp_path / name for name in SCHEMES}
    teachers.write_stores(directories, SCHEMES, model, corpus, hidden_states=forgetful)
    for directory in directories.values():
        assert teachers.verify(directory)["rows"] == 6
        with pytest.raises(InputError, match="the teacher says otherwise now"):
            teachers.verify(directory, corpus, model)


def test_a_teacher_without_its_corpus_is_refused(stores, model):
    with pytest.raises(InputError, match="only with the corpus"):
        teachers.verify(stores["top"], None, model)
    with pytest.raises(InputError, match="sample: 0"):
        teachers.verify(stores["top"], sample=0)


def test_total_variation_against_dense_distributions():
    rng = np.random.default_rng(0)
    ids, other_ids = (np.stack([rng.permutation(12)[:5] for _ in range(7)]) for _ in range(2))
    weights, other_weights = (rng.dirichlet(np.ones(5), 7) for _ in range(2))
    dense, other = np.zeros((7, 12)), np.zeros((7, 12))
    np.put_along_axis(dense, ids, weights, axis=1)
    np.put_along_axis(other, other_ids, other_weights, axis=1)
    found = total_variation(ids, weights, other_ids, other_weights)
    np.testing.assert_allclose(found, np.abs(dense - other).sum(axis=1) / 2)


@pytest.mark.parametrize("change", ["value", "shape", "name", "config"])
def test_a_teacher_is_known_by_shape_and_parameters(model, change):
    params, config = dict(model.params), model.config
    if change == "value":
        params["embedding"] = params["embedding"].at[299, 15].add(1e-6)
    elif change == "shape":
        params["embedding"] = params["embedding"].reshape(600, 8)
    elif change == "name":
        params["unembedding"] = params.pop("embedding")
    else:
        config = dataclasses.replace(config, rope_theta=1e4)
    changed = teachers.teacher_fingerprint(models.Model(config, params))
    assert changed != teachers.teacher_fingerprint(model)
    assert teachers.teacher_fingerprint(llama(0)) == teachers.teacher_fingerprint(model)


def test_the_fingerprint_does_not_depend_on_the_slices_read(model, monkeypatch):
    whole = teachers.teacher_fingerprint(model)
    monkeypatch.setattr(manifest, "_SLICE_BYTES", 1000)
    assert teachers.teacher_fingerprint(model) == whole
