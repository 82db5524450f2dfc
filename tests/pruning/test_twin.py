"""Llama 3.1 8B -> 3.2 1B in small: the same ratios of every size, seen through other programs."""

import dataclasses
import json

import hf_slicer
import numpy as np
import numpy_llama
import pytest
import safetensors.numpy
import tiny

from distill_jax import models
from distill_jax.models import interchange, presets
from distill_jax.pruning import apply_plan, make_plan

# Sizes of 8B and 1B over 64 (width), 4 (heads), 16 (head_dim) and 8 (layers).
SOURCE = dataclasses.replace(
    presets.LLAMA_3_1_8B,
    vocab_size=40,
    embed=64,
    mlp=224,
    layers=4,
    heads=8,
    kv_heads=2,
    head_dim=8,
    rope_scaling=models.RopeScaling(factor=8.0, original_context=64),
    context=512,
)
TARGET = dataclasses.replace(
    SOURCE,
    embed=32,
    mlp=128,
    layers=2,
    head_dim=4,
    tied=True,
    rope_scaling=models.RopeScaling(factor=32.0, original_context=64),
)
SCORES = tiny.random_scores(SOURCE, seed=4)
PLAN = make_plan(SCORES, SOURCE, TARGET)


def exported(place, config, params):
    models.export_hugging_face(place, models.Model(config, params))
    return safetensors.numpy.load_file(place / "model.safetensors")


@pytest.fixture(scope="module")
def model():
    return tiny.model(SOURCE, scale=0.1)


@pytest.fixture(scope="module")
def student(model, tmp_path_factory):
    """The folder of the pruned model, its tensors, and what slicing the source's tensors gives."""
    place = tmp_path_factory.mktemp("twin")
    before = exported(place / "source", SOURCE, model.params)
    after = exported(place / "student", TARGET, apply_plan(PLAN, model.params))
    return place / "student", after, hf_slicer.prune(before, SCORES, SOURCE, TARGET)


def test_the_twin_has_the_ratios_of_the_published_shapes():
    for name in ("embed", "mlp", "layers", "heads", "kv_heads", "head_dim"):
        large, small = (getattr(c, name) for c in (presets.LLAMA_3_1_8B, presets.LLAMA_3_2_1B))
        assert small * getattr(SOURCE, name) == large * getattr(TARGET, name), name
    assert (SOURCE.tied, TARGET.tied) == (presets.LLAMA_3_1_8B.tied, presets.LLAMA_3_2_1B.tied)


def test_surgery_equals_slicing_of_hugging_face_tensors(student):
    _, got, want = student
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        np.testing.assert_allclose(got[name], tensor, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("order", [[0, 1, 4, 5], [0, 4, 2, 6]], ids=str)
def test_pairs_in_the_other_order_differ_from_the_slices(student, model, tmp_path, order):
    """Pairs of the interleaved layout, and the right channels interleaved."""
    wrong = dataclasses.replace(PLAN, head_dim=np.array(order, np.int32))
    got = exported(tmp_path, TARGET, apply_plan(wrong, model.params))
    different = {
        name.split(".")[-2] for name, want in student[2].items() if (got[name] != want).any()
    }
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= different


@pytest.mark.parametrize("target", [presets.LLAMA_3_2_1B, presets.LLAMA_3_2_3B], ids=["1b", "3b"])
def test_kept_rotary_pairs_of_the_published_shapes(target):
    """Halving 128 keeps every second pair; a 3B's head is the 8B's."""
    plan_channels = make_plan(
        tiny.random_scores(presets.LLAMA_3_1_8B), presets.LLAMA_3_1_8B, target
    ).head_dim
    np.testing.assert_array_equal(
        plan_channels, hf_slicer.kept_channels(presets.LLAMA_3_1_8B, target)
    )


@pytest.mark.slow
def test_transformers_gives_the_logits_of_the_masked_model(student, model):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    place, _, _ = student
    theirs = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    kept = numpy_llama.frequencies(dataclasses.replace(SOURCE, rope_scaling=TARGET.rope_scaling))[
        ::2
    ]
    np.testing.assert_allclose(theirs.model.rotary_emb.inv_freq.numpy(), kept, rtol=1e-6)
    tokens = np.random.default_rng(0).integers(0, SOURCE.vocab_size, (2, 48))
    with torch.no_grad():
        got = theirs(torch.from_numpy(tokens)).logits.numpy()
    want = numpy_llama.logits(
        dataclasses.replace(SOURCE, rope_scaling=TARGET.rope_scaling),
        model.params,
        tokens,
        np.ones_like(tokens),
        numpy_llama.Masks.of_plan(PLAN),
        tied=True,
    )
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "parameters"),
    [(presets.LLAMA_3_2_1B, 1_235_814_400), (presets.LLAMA_3_2_3B, 3_212_749_824)],
    ids=["1b", "3b"],
)
def test_transformers_builds_the_published_shapes(target, parameters):
    """Every tensor of the abstract cut has the shape that transformers gives it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    described = models.config_to_hugging_face(target)
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**json.loads(json.dumps(described)))
        )
    assert sum(x.numel() for x in theirs.parameters()) == parameters
    wanted = {name: tuple(x.shape) for name, x in theirs.named_parameters()}
    assert {s.name: s.shape for s in interchange.slots(target, "hugging_face")} == wanted
