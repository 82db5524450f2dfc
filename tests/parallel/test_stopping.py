"""SIGTERM to one process; to several in tests/training and tests/test_several_processes.py."""

import os
import signal

import pytest

from distill_jax import parallel


def told():
    os.kill(os.getpid(), signal.SIGTERM)


def test_one_process_stops_at_once():
    before = signal.getsignal(signal.SIGTERM)
    went_on = False
    with pytest.raises(parallel.Preempted), parallel.stoppable():  # noqa: PT012
        told()
        went_on = True
    assert not went_on
    assert signal.getsignal(signal.SIGTERM) == before
    assert not parallel.preempted()


def test_a_block_that_asks_is_not_interrupted():
    steps = 0
    with parallel.stoppable():
        with parallel.deferring():
            assert not parallel.preempted()
            told()
            steps += 1
            assert parallel.preempted()
            assert parallel.preempted()
        with pytest.raises(parallel.Preempted, match="stopped before the next stage"):
            parallel.stop_if_preempted("before the next stage")
    assert steps == 1
    parallel.stop_if_preempted("here, where nobody was told")


def test_a_failure_is_no_preemption():
    with pytest.raises(ValueError, match="mine"), parallel.stoppable(), parallel.deferring():
        raise ValueError("mine")
    with pytest.raises(parallel.Preempted), parallel.stoppable():
        told()
