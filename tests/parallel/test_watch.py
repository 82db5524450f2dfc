"""What is said of processes that are lost or stuck; others find out in tests/training."""

import pytest

from distill_jax.parallel.watch import Judge


def word(beat, moves, step, doing="step"):
    return {"beat": beat, "moves": moves, "step": step, "doing": doing}


def told(*looks, lost=60.0, stall=300.0):
    """What the judge of three processes says last, given (time, words)."""
    judge = Judge(3, lost, stall, 0.0)
    *before, (now, words) = looks
    for when, said in before:
        assert judge.look(said, when) is None
    return judge.look(words, now)


def test_whoever_falls_silent_is_lost_and_where_it_was_is_told():
    at_work = {0: word(1, 5, 2), 1: word(1, 5, 2), 2: word(1, 5, 2)}
    later = {0: word(9, 9, 4), 1: word(1, 5, 2, "data"), 2: word(9, 9, 4)}
    assert told((10, at_work), (70, later)) is None
    assert (
        told((10, at_work), (71, later))
        == "process 1 of 3 is lost, silent for 61 s; it was at step 2 (data)"
    )
    assert told((10, {0: word(1, 1, 0), 2: word(1, 1, 0)}), (61, {0: word(2, 1, 0)})) == (
        "process 1 of 3 is lost, silent for 61 s"
    )


def test_whoever_took_leave_is_not_missed():
    ended = {process: word(3, 5, 2, "ended") for process in range(3)}
    assert told((10, ended), (1000, ended)) is None


@pytest.mark.parametrize(
    ("first", "second", "third", "line"),
    [
        ((4, "step"), (3, "data"), (4, "step"), "process 1 of 3 is stuck at step 3 (data)"),
        ((4, "step"), (4, "step"), (4, "data"), "process 2 of 3 is stuck at step 4 (data)"),
        ((4, "checkpoint"), (4, "step"), (4, "step"), "process 0 of 3 is stuck at step 4 (check"),
    ],
)
def test_whoever_the_others_wait_for_is_stuck(first, second, third, line):
    places = (first, second, third)
    looks = [
        (now, {index: word(now, 7, *place) for index, place in enumerate(places)})
        for now in range(0, 301, 30)
    ]
    assert told(*looks) is None
    last = {index: word(999, 7, *place) for index, place in enumerate(places)}
    assert told(*looks, (301, last)).startswith(line)


def test_nobody_is_stuck_while_one_moves_or_works_outside_of_loops():
    def looks(moves, doing):
        return [
            (now, {0: word(now, 1, 1), 1: word(now, moves(now), 1), 2: word(now, 1, 1, doing)})
            for now in range(0, 3000, 30)
        ]

    assert told(*looks(lambda now: now, "step")) is None
    assert told(*looks(lambda now: 1, None)) is None
