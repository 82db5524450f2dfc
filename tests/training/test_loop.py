import contextlib
import dataclasses
import io
import json
import os
import pathlib
import signal

import grain
import jax
import numpy as np
import pytest
from drawn import drawn_params
from etils import epath

from distill_jax import losses, models, parallel
from distill_jax.artifacts import InputError
from distill_jax.training import (
    TrainConfig,
    language_model_loss,
    parse_steps,
    read_metrics,
    read_sessions,
    train,
)
from distill_jax.training.profiling import Profiler

from .bigrams import bigram_loss

CONFIG = models.LlamaConfig(
    vocab_size=31, embed=16, mlp=32, layers=2, heads=4, kv_heads=2, head_dim=4, tied=True
)
TRAIN = TrainConfig(steps=7, batch_rows=8, checkpoint_every=2)


class Killed(Exception):
    """Stands for the end of the process."""


def rows(count=20, time=12):
    rng = np.random.default_rng(0)
    for _ in range(count):
        segments = np.repeat([1, 2, 0], [4, 3, time - 7]).astype(np.int32)
        yield {
            "tokens": rng.integers(0, 31, time).astype(np.int32),
            "segment_ids": segments,
            "labels": rng.integers(0, 31, time).astype(np.int32),
            "where": segments > 0,
        }


def batches():
    shuffled = grain.MapDataset.source(list(rows())).seed(5).shuffle().repeat().batch(8)
    # Grain's default reads 500 batches ahead by 16 threads.
    return iter(shuffled.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)))


class Dying(grain.DatasetIterator):
    """An iterator as seen by a process that is killed after so many batches."""

    def __init__(self, iterator, after):
        super().__init__()
        self._iterator, self._left = iterator, after

    def __next__(self):
        if not self._left:
            raise Killed
        self._left -= 1
        return next(self._iterator)

    def get_state(self):
        return self._iterator.get_state()

    def set_state(self, state):
        self._iterator.set_state(state)


class Told(Dying):
    """An iterator as seen by a process that gets SIGTERM before the batch of a certain step."""

    def __init__(self, iterator, step):
        super().__init__(iterator, 0)
        self._step = step

    def __next__(self):
        if self.get_state()["next_index"] == self._step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return next(self._iterator)


def run(directory, iterator=None, config=TRAIN, mesh=None, shape=CONFIG):
    model = models.Model(shape, jax.device_put(drawn_params(shape)))
    objective = losses.weighted_sum(hard=(1.0, losses.hard_labels()))
    loss_fn = language_model_loss(shape, objective, mesh=mesh)
    iterator = iterator or batches()
    return train(model, loss_fn, iterator, config, directory, mesh=mesh, split_time=True)


@pytest.fixture(scope="module")
def model():
    return models.Model(CONFIG, jax.device_put(drawn_params(CONFIG)))


@dataclasses.dataclass(frozen=True)
class Whole:
    place: pathlib.Path
    given: dict  # the parameters before
    last: models.Model
    said: str


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model):
    """A run that nothing ends, of which two steps are traced."""
    place, given = tmp_path_factory.mktemp("whole"), jax.tree.map(np.array, model.params)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        last = train(model, bigram_loss, batches(), TRAIN, place, profile=(3, 4))
    return Whole(place, given, last, said.getvalue())


# Past a checkpoint; before the first, between those that are due, and at one.
@pytest.mark.parametrize(
    ("ends", "sessions"),
    [
        (((Dying, 3),), [(0, 3), (2, 7)]),
        pytest.param(
            ((Dying, 1), (Told, 3), (Dying, 2), (Told, 6)),
            [(0, 1), (0, 3), (3, 5), (4, 6), (6, 7)],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_killed_or_told_to_stop_it_goes_on_with_the_same_bits(
    tmp_path, model, whole, ends, sessions
):
    def ended(iterator):
        return train(model, bigram_loss, iterator, TRAIN, tmp_path)

    for way, step in ends:
        if way is Dying:
            with pytest.raises(Killed):
                ended(Dying(batches(), step))
        else:
            stopped = pytest.raises(parallel.Preempted, match=f"train: stopped after step {step}")
            with stopped, parallel.stoppable():
                ended(Told(batches(), step))
            assert len(read_metrics(tmp_path / "metrics.jsonl")) == step
    # At the last step there is nothing left to stop.
    with parallel.stoppable():
        last = ended(Told(batches(), TRAIN.steps))
    jax.tree.map(np.testing.assert_array_equal, whole.last.params, last.params)
    expected = read_metrics(whole.place / "metrics.jsonl")
    assert read_metrics(tmp_path / "metrics.jsonl") == expected
    assert [line["step"] for line in expected] == list(range(1, 8))
    assert expected[-1]["tokens"] == 7 * 8 * 12
    found = [(one["first"], one["last"]) for one in read_sessions(epath.Path(tmp_path))]
    assert found == sessions


@pytest.mark.slow
def test_learns_and_reports_the_loss_of_the_parameters_before_the_step(tmp_path):
    config = TrainConfig(steps=30, batch_rows=8)
    run(tmp_path, config=config)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[0]["loss"] == pytest.approx(np.log(31), abs=0.02)  # near-uniform at the start
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.02
    assert lines[0]["hard"] == lines[0]["loss"]


# A vocabulary that is left whole, with rows that devices share, and one that is split over two.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("vocabulary", "sizes"), [(31, {"sequence": 2, "tensor": 2}), (32, {"data": 2, "tensor": 2})]
)
def test_one_device_and_eight_agree(tmp_path, vocabulary, sizes):
    shape = dataclasses.replace(CONFIG, vocab_size=vocabulary)
    eight = run(
        tmp_path / "eight",
        mesh=parallel.make_mesh(parallel.MeshConfig(**sizes)),
        shape=shape,
    )
    single = jax.sharding.Mesh(
        np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor")
    )
    one = run(tmp_path / "one", mesh=single, shape=shape)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), one.params, eight.params)
    first = [
        read_metrics(tmp_path / name / "metrics.jsonl")[0]["loss"] for name in ("one", "eight")
    ]
    assert first[0] == pytest.approx(first[1], rel=1e-6)


def test_the_head_is_split_over_a_mesh():
    params = drawn_params(CONFIG)
    batch = next(batches())

    def traced(mesh):
        loss_fn = language_model_loss(CONFIG, losses.hard_labels(), mesh=mesh)
        return str(jax.make_jaxpr(loss_fn)(params, batch, 0))

    assert "shard_map" in traced(parallel.make_mesh())
    assert "shard_map" not in traced(None)


def test_the_given_model_is_left_as_it_was(whole, model):
    jax.tree.map(np.testing.assert_array_equal, whole.given, model.params)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, model):
    broken = lambda params, batch, step: losses.reduce(  # noqa: E731
        params["final_norm"] * np.nan, {}
    )
    with pytest.raises(FloatingPointError, match="loss is nan at step 1"):
        train(model, broken, batches(), TRAIN, tmp_path)


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_stops_the_run_though_the_loss_is(tmp_path, model):
    steep = lambda params, batch, step: losses.reduce(  # noqa: E731
        jax.numpy.sqrt(0 * params["final_norm"]), {}
    )
    with pytest.raises(FloatingPointError, match="gradient_norm is nan at step 1"):
        train(model, steep, batches(), TRAIN, tmp_path)


def test_a_torn_last_line_of_metrics_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "loss": 2.0}) + '\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]


def test_rows_that_do_not_divide_over_the_devices_are_refused(tmp_path):
    with pytest.raises(
        InputError, match="batch_rows 8 / accumulation 2 is not a multiple of the 8"
    ):
        run(tmp_path, config=TrainConfig(steps=1, batch_rows=8, accumulation=2))


# Of JAX's own types, when Python 3.13 first sees them; as an error it ends the process.
@pytest.mark.filterwarnings("ignore:builtin type event_stats:DeprecationWarning")
def test_given_steps_are_traced_whole_and_no_others(tmp_path, whole, capsys):
    (trace,) = whole.place.glob("profile/plugins/profile/*/*.xplane.pb")
    # Planes, lines and events are views: they end the process where the data they see is gone.
    data = jax.profiler.ProfileData.from_file(str(trace))
    steps = [
        dict(event.stats)["step_num"]
        for plane in data.planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    ]
    assert steps == [3, 4]
    assert f"train: trace in {whole.place / 'profile'}" in whole.said
    with Profiler((8, 9), epath.Path(tmp_path), "late") as profiler:
        profiler.before(7, None)
    assert "late: no trace, none of the steps 8:9 was done" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "steps"), [("10:13", (10, 13)), ("7", (7, 7))])
def test_steps_to_trace_are_read(text, steps):
    assert parse_steps(text) == steps


@pytest.mark.parametrize("text", ["", "0", "3:2", "1:", "1:2:3", "-1:2", "a"])
def test_other_steps_to_trace_are_refused(text):
    with pytest.raises(InputError, match=f"--profile {text}: write the first and the last step"):
        parse_steps(text)
