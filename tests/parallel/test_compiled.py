import os
import pathlib
import subprocess
import sys
import zlib

import jax
import pytest

from distill_jax import parallel
from distill_jax.parallel import processes

OPTIONS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def place(monkeypatch, tmp_path):
    """Where programs would lie: no directory is set, and the user's own cache is empty."""
    before = {name: jax.config.values[name] for name in OPTIONS}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "distill_jax" / "compiled"
    for name, value in before.items():
        jax.config.update(name, value)


def directory():
    parallel.keep_compiled()
    return jax.config.values["jax_compilation_cache_dir"]


def test_the_users_cache_is_taken_and_nobody_else_may_write_there(place):
    assert directory() == str(place)
    assert place.stat().st_mode & 0o077 == 0


def test_a_directory_that_is_set_stays(place):
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/compiled")
    assert directory() == "gs://bucket/compiled"
    assert not place.exists()


def test_of_several_processes_none_takes_a_directory_that_others_do_not_read(place, monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    assert directory() is None


def test_a_directory_of_others_or_none_at_all_is_no_error(place, monkeypatch):
    place.mkdir(parents=True)
    place.chmod(0o777)
    assert directory() is None
    place.rmdir()
    place.parent.rmdir()
    place.parent.write_text("in the way")
    assert directory() is None
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(pathlib.Path, "home", lambda: pathlib.Path("~no-such-user").expanduser())
    assert directory() is None


def test_entries_that_a_kill_cut_are_removed(place):
    place.mkdir(parents=True, mode=0o700)
    whole = zlib.compress(os.urandom(999))
    for name, data in (("a", whole), ("b", whole[:-1]), ("c", b""), ("d", b"\x28\xb5\x2f\xfd...")):
        (place / f"{name}-cache").write_bytes(data)
    assert directory() == str(place)
    assert [path.name[0] for path in sorted(place.glob("*-cache"))] == ["a", "d"]


PROGRAM = """
import jax, jax.monitoring, jax.numpy as jnp
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
from distill_jax import parallel
parallel.keep_compiled()
print(float(jax.jit(lambda x: jnp.sin(x @ x.T).sum() + 17)(jnp.ones((5, 3)))))
print("/jax/compilation_cache/cache_hits" in hits)
"""


def test_the_next_process_uses_what_one_compiled(place):
    environment = {k: v for k, v in os.environ.items() if "COMPILATION_CACHE" not in k}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    environment["PYTHONPATH"] = str(pathlib.Path(__file__).parents[2])

    def run():
        command = [sys.executable, "-c", PROGRAM]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert "Warning" not in ended.stderr
        return ended.stdout.split()

    value, hit = run()
    assert hit == "False"
    assert run() == [value, "True"]
    for entry in place.glob("*-cache"):
        entry.write_bytes(entry.read_bytes()[:-7])
    assert run() == [value, "False"]
    assert run() == [value, "True"]
