import random

import pytest

from distill_jax import data

SENTENCE = "the cat sat on a mat while 12 dogs ran to Zürich and 日本 in 1999 , quite happily ."


def make_passages(count, seed=0):
    rng, words = random.Random(seed), SENTENCE.split()
    return [" ".join(rng.choices(words, k=rng.randrange(3, 60))) + f" #{i}" for i in range(count)]


@pytest.fixture(scope="session")
def passages():
    return make_passages(200)


@pytest.fixture(scope="session")
def tokenizer():
    return data.train_tokenizer(make_passages(50, seed=1), 330)
