import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax import losses, parallel
from distill_jax.training import (
    OptimizerConfig,
    TrainConfig,
    TrainState,
    jit_step,
    learning_rate,
    make_optimizer,
    make_step,
)
from distill_jax.training.step import sum_gradients

AXES = {"weight": ("embed", "mlp"), "norm": ("embed",)}


def regression(params, batch, step):
    """Weighted squared error of a linear layer with a norm-like scale."""
    prediction = (batch["x"] * params["norm"]) @ params["weight"]
    loss = jnp.sum(jnp.square(prediction - batch["y"]), axis=-1)
    return losses.reduce(loss, {"twice": 2 * loss}, batch["where"])


def problem(rows=8, seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "weight": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32),
        "norm": jnp.asarray(rng.normal(size=5), jnp.float32),
    }
    batch = {
        "x": rng.normal(size=(rows, 5)).astype(np.float32),
        "y": rng.normal(size=(rows, 3)).astype(np.float32),
        "where": np.array([1, 1, 0, 1, 0, 0, 1, 1][:rows], np.float32),
    }
    return params, batch


def run_steps(steps, config, **kwargs):
    params, _ = problem()
    optimizer = make_optimizer(config, steps, AXES)
    state = TrainState.create(params, optimizer)
    step_fn = jax.jit(make_step(regression, optimizer, **kwargs))
    metrics = []
    for seed in range(steps):
        state, figures = step_fn(state, problem(seed=seed)[1])
        metrics.append(figures)
    return state, metrics


def test_learning_rate_by_hand():
    config = OptimizerConfig(
        learning_rate=1.0, schedule="linear", warmup_fraction=0.4, final_fraction=0.5
    )
    schedule = learning_rate(config, 10)
    expected = [0.2, 0.4, 0.6, 0.8, 1.0, 1 - 0.5 / 6, 1 - 1.0 / 6]
    np.testing.assert_allclose([schedule(i) for i in range(7)], expected, rtol=1e-6)
    assert learning_rate(OptimizerConfig(warmup_fraction=0.0), 10)(0) == pytest.approx(1e-3)


def test_the_batch_is_divided_once_by_its_weight():
    params, batch = problem()
    x, y, where = (batch[name].astype(np.float64) for name in ("x", "y", "where"))
    scaled = x * np.asarray(params["norm"], np.float64)
    error = scaled @ np.asarray(params["weight"], np.float64) - y
    gradient = 2 * (scaled * where[:, None]).T @ error / where.sum()
    optimizer = optax.sgd(1.0)
    state = TrainState.create(params, optimizer)
    state, metrics = make_step(regression, optimizer)(state, batch)
    np.testing.assert_allclose(params["weight"] - state.params["weight"], gradient, rtol=1e-5)
    mean = (where * (error**2).sum(-1)).sum() / where.sum()
    assert metrics["loss"] == pytest.approx(mean, rel=1e-5)
    assert metrics["twice"] == pytest.approx(2 * mean, rel=1e-5)
    assert metrics["weight"] == 5


@pytest.mark.slow
def test_accumulation_changes_nothing_though_microbatches_weigh_differently():
    params, batch = problem()
    whole = sum_gradients(regression, params, batch, jnp.int32(0), 1)
    for parts in (2, 4, 8):
        split = sum_gradients(regression, params, batch, jnp.int32(0), parts)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6), whole, split
        )


def test_a_batch_without_weight_changes_no_gradient():
    params, batch = problem()
    optimizer = optax.sgd(1.0)
    state, metrics = make_step(regression, optimizer)(
        TrainState.create(params, optimizer), {**batch, "where": np.zeros(8, np.float32)}
    )
    assert metrics["loss"] == 0
    np.testing.assert_array_equal(state.params["weight"], params["weight"])


@pytest.mark.slow
def test_optimizer_equals_pytorch():
    torch = pytest.importorskip("torch")
    steps, config = 6, OptimizerConfig(learning_rate=0.1, warmup_fraction=0.0, clip_norm=0.7)
    state, _ = run_steps(steps, config, accumulation=2)
    params, _ = problem()
    weight, norm = (
        torch.nn.Parameter(torch.tensor(np.asarray(params[name], np.float64)))
        for name in ("weight", "norm")
    )
    groups = [{"params": [weight], "weight_decay": 0.1}, {"params": [norm], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), eps=1e-8)
    for step in range(steps):
        batch = {k: torch.tensor(v.astype(np.float64)) for k, v in problem(seed=step)[1].items()}
        rate = 0.1 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        error = ((batch["x"] * norm) @ weight - batch["y"]).square().sum(-1)
        optimizer.zero_grad()
        ((error * batch["where"]).sum() / batch["where"].sum()).backward()
        torch.nn.utils.clip_grad_norm_([weight, norm], 0.7)
        optimizer.step()
    np.testing.assert_allclose(state.params["weight"], weight.detach().numpy(), rtol=2e-5)
    np.testing.assert_allclose(state.params["norm"], norm.detach().numpy(), rtol=2e-5)


def test_the_step_is_compiled_with_the_options_of_its_mesh(monkeypatch):
    mesh, asked = parallel.make_mesh(), []
    options = {"xla_no_such_option": True}
    monkeypatch.setattr(parallel, "compiler_options", lambda mesh: asked.append(mesh) or options)
    params, batch = problem()
    jitted = jit_step(params, AXES, regression, TrainConfig(steps=1), mesh)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        jitted.function.lower(jitted.state, batch).compile()
    assert asked == [mesh]
