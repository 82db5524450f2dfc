"""What a person who waits is told, by a clock that the test holds."""

import re
import types

import jax
import pytest

from distill_jax import progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that `progress` believes to have passed."""
    made = types.SimpleNamespace(now=100.0)
    time = types.SimpleNamespace(monotonic=lambda: made.now)
    monkeypatch.setattr(progress, "time", time)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    return made


def write_targets(clock):
    """40 rows of 100 tokens in 20 s, where 20 of 100 rows were done before."""
    with progress.bar("targets", 100, unit="rows", done=20) as bar:
        clock.now += 10
        bar.advance(10, tokens=1000)
        clock.now += 10
        bar.advance(30, tokens=3000)


def test_without_a_terminal_a_line_now_and_then_tells_rate_and_time_left(clock, capsys):
    write_targets(clock)
    (line,) = capsys.readouterr().err.splitlines()
    # 60 of 100 are done, the 40 of this run at 2 a second, and so are the 40 that are left.
    assert " ".join(line.split()) == "targets: 60/100 rows 200 tokens/s 20 s left"


def test_a_terminal_has_a_bar_with_the_same(clock, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    write_targets(clock)
    shown = re.sub(r"\x1b\[[\d;?]*\w", "", capsys.readouterr().err)
    last = shown.strip().splitlines()[-1].split("\r")[-1]
    assert re.search(r"targets .* 60/100 rows +200 tokens/s +[-\d]:[-\d]{2}:[-\d]{2}", last), shown


def test_of_several_processes_the_first_alone_speaks(clock, capsys, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    for index, lines in ((0, 1), (1, 0)):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        write_targets(clock)
        assert len(capsys.readouterr().err.splitlines()) == lines
