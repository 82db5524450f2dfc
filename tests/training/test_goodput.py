"""Where a run's time went, counted by hand."""

import itertools

import pytest
from etils import epath

from distill_jax.training import Goodput, account, account_line, goodput, read_sessions


def session(start, end, first, last, **seconds):
    spent = {"start-up": 0.0, "compile": 0.0, "data": 0.0, "checkpoint": 0.0} | seconds
    step = end - start - sum(spent.values())
    return {
        "start": float(start),
        "end": float(end),
        "first": first,
        "last": last,
        "seconds": {"step": step, **spent},
    }


def test_steps_that_were_lost_and_time_between_sessions_do_not_count():
    sessions = [
        session(0, 100, 0, 10, compile=20, data=5, checkpoint=15),  # 60 s in 10 steps
        session(130, 180, 8, 16, compile=10),  # goes on before the last 2 of them; 40 s in 8
        session(180, 200, 16, 16, **{"start-up": 20}),
    ]
    found = account(sessions)
    assert found["wall"] == 200
    assert found["sessions"] == 3
    assert found["seconds"] == {
        "step": 60 - 12 + 40,
        "start-up": 20,
        "compile": 30,
        "data": 5,
        "checkpoint": 15,
        "recomputed": 12,
        "down": 30,
    }
    assert found["goodput"] == pytest.approx(0.44)
    assert account_line(found) == (
        "goodput 44.0% of 200.0 s; compile 30.0 s, down 30.0 s, start-up 20.0 s, checkpoint 15.0 s,"
        " recomputed 12.0 s, data 5.0 s"
    )
    assert account([]) == {}


def test_a_start_that_failed_loses_no_steps():
    sessions = [
        session(0, 100, 0, 500),
        session(110, 130, None, None, **{"start-up": 20}),
        session(140, 160, 500, 600),
    ]
    seconds = account(sessions)["seconds"]
    assert (seconds["step"], seconds["recomputed"]) == (120, 0)
    assert (seconds["start-up"], seconds["down"]) == (20, 20)


def test_a_session_that_did_not_begin_was_starting_up(tmp_path):
    place = epath.Path(tmp_path)
    with pytest.raises(OSError, match="no bucket"), Goodput(place):
        raise OSError("no bucket")
    (left,) = read_sessions(place)
    assert left["first"] is None
    assert left["seconds"]["step"] == 0
    assert left["seconds"]["start-up"] == pytest.approx(left["end"] - left["start"], abs=1e-5)


class Busy:
    """What devices compute, as the host sees it."""

    def __init__(self, ready):
        self.is_ready = lambda: ready


def test_a_session_counts_what_did_no_step(tmp_path, monkeypatch):
    """The clock goes on by a second whenever it is read."""
    ticks = itertools.count(0.0)
    monkeypatch.setattr(goodput.time, "monotonic", lambda: next(ticks))
    monkeypatch.setattr(goodput.time, "time", lambda: 1000.0)
    place = epath.Path(tmp_path)
    with Goodput(place) as spent:  # 0
        spent.begin(4)  # 1
        with spent.on("compile", 5):  # 2 to 3
            pass
        with spent.on("data", 5, unless_busy=Busy(True)):  # 4 to 5
            pass
        with spent.on("data", 6, unless_busy=Busy(False)):  # 6, and nobody reads the clock
            pass
        with spent.on("step", 6):  # 7
            pass
        with spent.on("checkpoint", 6):  # 8 to 9
            pass
        spent.done(6, record=True)  # 10, 11
        (recorded,) = read_sessions(place)
    (ended,) = read_sessions(place)  # 12, 13
    lost = {"start-up": 1.0, "compile": 1.0, "data": 1.0, "checkpoint": 1.0}
    for found, wall in ((recorded, 11.0), (ended, 13.0)):
        assert found == {
            "start": 1000.0,
            "end": 1000.0 + wall,
            "first": 4,
            "last": 6,
            "seconds": {"step": wall - 4, **lost},
        }
    with Goodput(place):
        pass
    assert len(read_sessions(place)) == 2
