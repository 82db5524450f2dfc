import os
import pathlib
import subprocess
import sys

import jax
import pytest

from distill_jax import parallel

OPTIONS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def unset(monkeypatch, tmp_path):
    """No directory is set, and the user's own cache is an empty one."""
    before = {name: jax.config.values[name] for name in OPTIONS}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "distill_jax" / "compiled"
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_users_cache_is_taken_and_nobody_else_may_write_there(unset):
    parallel.keep_compiled()
    assert jax.config.values["jax_compilation_cache_dir"] == str(unset)
    assert unset.stat().st_mode & 0o077 == 0


def test_a_directory_that_is_set_stays(unset):
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/compiled")
    parallel.keep_compiled()
    assert jax.config.values["jax_compilation_cache_dir"] == "gs://bucket/compiled"
    assert not unset.exists()


def test_a_home_that_cannot_be_written_to_is_no_error(unset):
    unset.parents[1].write_text("in the way")
    parallel.keep_compiled()
    assert jax.config.values["jax_compilation_cache_dir"] is None


PROGRAM = """
import jax, jax.monitoring, jax.numpy as jnp
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
from distill_jax import parallel
parallel.keep_compiled()
step = jax.jit(lambda x: jnp.linalg.svd(jnp.sin(x @ x.T))[1].sum() + 17)
print(float(step(jnp.ones((5, 3)))), "/jax/compilation_cache/cache_hits" in hits)
"""


def test_the_next_process_uses_what_one_compiled(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMP")}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_NUM_CPU_DEVICES": "1"}
    environment["PYTHONPATH"] = str(pathlib.Path(__file__).parents[2])
    said = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
        ).stdout.split()
        for _ in range(2)
    ]
    assert [hit for _, hit in said] == ["False", "True"]
    assert said[0][0] == said[1][0]
