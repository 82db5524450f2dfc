"""The head on a mesh of eight devices: tokens, channels and vocabulary split."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distill_jax import losses

from . import oracles

N, D, V, CHUNK = 48, 6, 64, 8
ROWS = P(("data", "fsdp"))
OBJECTIVES = {
    "hard": losses.hard_labels(z_loss=1e-3, label_smoothing=0.1),
    "sampled": losses.distill("sampled", losses.forward_kl),
    **{
        f"{kind} {name}": losses.distill(kind, oracles.loss(name))
        for kind in ("dense", "top_k")
        for name in oracles.DIVERGENCES
    },
}
QUICK = ("hard", "sampled", "dense forward_kl", "top_k forward_kl", "top_k reverse_kl")


def make_mesh(data, fsdp, tensor):
    auto = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh((data, fsdp, tensor), ("data", "fsdp", "tensor"), axis_types=auto)


def inputs(name):
    rng = np.random.default_rng(0)
    teacher = rng.normal(size=(N, V)) * 2
    targets = {
        "hard": {"labels": jnp.asarray(rng.integers(0, V, N))},
        "dense": {"dense": jnp.asarray(teacher, jnp.float32)},
        "top_k": {"top_k": oracles.top_k(teacher, 5)[0]},
        "sampled": {"sampled": oracles.sampled(teacher, 5, rng)},
    }[name.split()[0]]
    hidden = jnp.asarray(rng.normal(size=(N, D)), jnp.float32)
    unembedding = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    return hidden, unembedding, targets, jnp.asarray(rng.uniform(size=N) > 0.3, jnp.float32)


def place(mesh, arrays):
    """Each array where a trainer would have it, logits of a teacher split as the student's."""

    def put(tree, *axes):
        return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P(*axes))), tree)

    hidden, unembedding, targets, where = arrays
    split = ("tensor",) if "dense" in targets else ()
    return (
        put(hidden, *ROWS),
        put(unembedding, "fsdp", "tensor"),
        put(targets, *ROWS, *split),
        put(where, *ROWS),
    )


def one_device(objective, *arrays):
    hidden, unembedding, targets, where = arrays

    def mean(hidden, unembedding):
        return losses.reduce(*objective(hidden @ unembedding, targets), where).mean()[0]

    return jax.value_and_grad(mean, argnums=(0, 1))(hidden, unembedding)


def step_on(mesh, objective, **kwargs):
    def mean(hidden, unembedding, targets, where):
        return losses.sharded_fused_linear(
            objective, hidden, unembedding, targets, where, mesh=mesh, chunk=CHUNK, **kwargs
        ).mean()[0]

    return jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))


@pytest.mark.parametrize(("least", "tokens"), [(0, 256), (384, 384)])
def test_a_device_takes_no_fewer_tokens_at_a_time_than_is_asked(least, tokens):
    mesh = make_mesh(2, 1, 1)
    targets = {"labels": jnp.zeros(1536, jnp.int32)}

    def loss(hidden_ND):
        return losses.sharded_fused_linear(
            losses.hard_labels(), hidden_ND, jnp.ones((D, V)), targets, mesh=mesh, least_chunk=least
        ).loss

    text = str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((1536, D))))
    assert f"f32[{tokens},{V}]" in text  # logits of as many of a device's 768 tokens
    assert f"f32[{640 - tokens},{V}]" not in text


def shapes_of(opcodes, text):
    found = re.findall(rf"= \(?(\w+\[[\d,]*\])\S*(?:,[^=]*)? (?:{opcodes})(?:-start)?\(", text)
    return set(found)


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in sorted(OBJECTIVES)
    ],
)
def test_equals_one_device_and_keeps_the_vocabulary_split(name):
    mesh = make_mesh(1, 2, 4)
    arrays = inputs(name)
    step = step_on(mesh, OBJECTIVES[name])
    compiled = step.lower(*place(mesh, arrays)).compile()
    result = compiled(*place(mesh, arrays))
    chex.assert_trees_all_close(result, one_device(OBJECTIVES[name], *arrays), rtol=1e-5, atol=1e-6)
    assert result[1][1].sharding.spec == P("fsdp", "tensor")
    text = compiled.as_text()
    local = V // 4
    assert f"[{CHUNK},{local}]" in text  # the search sees a device's logits
    assert not re.search(rf"\[(?:\d+,)*{V}(?:,\d+)*\]", text)  # and nothing of the whole vocabulary
    # Gathered: the unembedding's channels. Reduced back: their gradient. Sums: a number a token.
    assert shapes_of("all-gather", text) == {f"f32[{D},{local}]"}
    assert shapes_of("reduce-scatter", text) == {f"f32[{D // 2},{local}]"}
    assert not re.search(r"(all-to-all|collective-permute)\(", text)
    allowed = {f"f32[{CHUNK}]", f"s32[{CHUNK}]", f"f32[{CHUNK},{D}]", f"f32[{CHUNK},5]", "f32[]"}
    assert shapes_of("all-reduce", text) <= allowed | {f"f32[{D // 2},{local}]"}


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((2, 2, 2), {}),
        ((8, 1, 1), {}),
        ((4, 2, 1), {"vocabulary": None}),
        ((4, 1, 2), {"tokens": ("data",), "embed": None}),
    ],
)
def test_any_mesh_gives_the_same(shape, axes):
    mesh = make_mesh(*shape)
    objective = OBJECTIVES["top_k reverse_kl"]
    arrays = inputs("top_k")
    chex.assert_trees_all_close(
        step_on(mesh, objective, **axes)(*arrays),
        one_device(objective, *arrays),
        rtol=1e-5,
        atol=1e-6,
    )


def test_transposed_unembedding_stays_so():
    mesh = make_mesh(1, 2, 4)
    hidden, unembedding, targets, where = place(mesh, inputs("top_k"))
    objective = OBJECTIVES["top_k forward_kl"]
    tied = jax.device_put(unembedding.T, NamedSharding(mesh, P("tensor", "fsdp")))
    compiled = (
        step_on(mesh, objective, transposed=True).lower(hidden, tied, targets, where).compile()
    )
    loss, (hidden_bar, bar_VD) = compiled(hidden, tied, targets, where)
    expected = one_device(objective, *inputs("top_k"))
    chex.assert_trees_all_close((loss, (hidden_bar, bar_VD.T)), expected, rtol=1e-5, atol=1e-6)
    text, local = compiled.as_text(), V // 4
    assert shapes_of("all-gather", text) == {f"f32[{local},{D}]"}
    assert shapes_of("reduce-scatter", text) == {f"f32[{local},{D // 2}]"}


def test_float32_master_gets_a_float32_gradient_through_bfloat16_compute():
    """256 equal tokens: their 1/256 shares reach 1 only if they add up in float32."""
    mesh = make_mesh(2, 4, 1)
    hidden = jnp.ones((4096, 4), jnp.bfloat16)
    unembedding = jnp.zeros((4, 2), jnp.float32)
    targets = {"labels": jnp.zeros(4096, jnp.int32)}

    def total(hidden, unembedding):
        return losses.sharded_fused_linear(
            losses.hard_labels(), hidden, unembedding, targets, mesh=mesh, chunk=1
        ).loss

    slopes = jax.jit(jax.grad(total, argnums=(0, 1)))(hidden, unembedding)
    assert (slopes[0].dtype, slopes[1].dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(slopes[1], [[-2048.0, 2048.0]] * 4)


def test_evaluation_and_schedules():
    mesh = make_mesh(2, 2, 2)
    hidden, unembedding, targets, where = inputs("hard")
    objective = losses.weighted_sum(hard=(lambda step: 0.5 * step, losses.hard_labels()))
    totals = jax.jit(
        lambda step: losses.sharded_fused_linear(
            objective, hidden, unembedding, targets, where, mesh=mesh, step=step
        )
    )(jnp.asarray(4))
    expected = losses.reduce(*objective(hidden @ unembedding, targets, step=4), where)
    chex.assert_trees_all_close(totals, expected, rtol=1e-5)


def test_what_does_not_fit_is_refused():
    mesh = make_mesh(2, 2, 2)
    hidden, unembedding, targets, _ = inputs("hard")

    def head(hidden=hidden, unembedding=unembedding, targets=targets, **kwargs):
        return losses.sharded_fused_linear(
            losses.hard_labels(), hidden, unembedding, targets, mesh=mesh, **kwargs
        )

    with pytest.raises(ValueError, match="do not fit a mesh with axes"):
        head(vocabulary="model")
    with pytest.raises(ValueError, match="embed must be among tokens"):
        head(tokens=("data",))
    with pytest.raises(ValueError, match="vocabulary must not"):
        head(vocabulary="data")
    explicit = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with pytest.raises(ValueError, match="a mesh of Auto axes"):
        losses.sharded_fused_linear(
            losses.hard_labels(),
            hidden,
            unembedding,
            targets,
            mesh=explicit,
            tokens="data",
            embed=None,
            vocabulary=None,
        )
    with pytest.raises(ValueError, match="tokens: 47 do not divide over 4 devices"):
        head(hidden[1:], targets={"labels": targets["labels"][1:]})
    with pytest.raises(ValueError, match="embed: 5 do not divide over 2 devices"):
        head(hidden[:, 1:], unembedding[1:])
    with pytest.raises(ValueError, match="vocabulary: 63 do not divide over 2 devices"):
        head(unembedding=unembedding[:, 1:])
    with pytest.raises(TypeError, match="no second derivative"):
        jax.grad(lambda h: jax.grad(lambda h: head(h).loss)(h).sum())(hidden)


def test_only_logits_of_one_device_are_written_in_tiles():
    """Elsewhere the compiler may have spread them, and would gather them to put tiles in order."""
    hidden, unembedding, targets = jnp.ones((64, 4)), jnp.ones((4, 128)), {"labels": jnp.arange(64)}

    def chooses(**where):
        head = losses.sharded_fused_linear if where else losses.fused_linear

        def loss(hidden):
            return head(losses.hard_labels(), hidden, unembedding, targets, chunk=8, **where).loss

        return "platform_index" in str(jax.make_jaxpr(jax.grad(loss))(hidden))

    assert chooses(mesh=make_mesh(4, 2, 1))
    assert not chooses(mesh=make_mesh(4, 1, 2))
    assert not chooses()
