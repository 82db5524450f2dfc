"""Every test sees eight CPU devices, so that sharding is exercised wherever it matters.

All processes of a run of the tests, those that tests start among them, share what they compile:
most of the time goes there, and recipes are run several times. For the same reason the compiler
does not optimise, but where the fixture `optimised` asks for it: programs of the tests run on a
handful of numbers.
"""

import gc
import importlib.metadata
import os
import pathlib
import resource
import sys
import tempfile

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Threads of XLA: in a collective each device holds one, and others must be left to compute.
os.environ.setdefault("NPROC", "16")
# Threads of LAPACK, which every device calls, and of PyTorch. Where cores are few, several wait for
# one another longer than they compute.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
_flags = [
    "--xla_cpu_parallel_codegen_split_count=1",
    # Of what optimises, where a test asks for it, the part that is worth its time.
    "--xla_backend_optimization_level=1",
    "--xla_llvm_disable_expensive_passes=true",
]
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    # Of the compiler's time, two fifths. Newer ones know no other way to emit a fusion.
    _flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(_flags))
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="distill_jax-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# Tracing makes objects by the million, few of them in cycles: looking for these takes time.
gc.set_threshold(20_000, 20, 20)

_LONGEST = ("test_end_to_end.py", "test_checks.py", "test_loop.py")


def pytest_collection_modifyitems(items):
    """The longest files first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.path.name not in _LONGEST)


@pytest.fixture(scope="module")
def optimised():
    """Optimises what this process compiles, a little: for tests that compute longer than that."""
    import jax

    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, False)
    yield
    jax.config.update(name, before)


@pytest.fixture(scope="module", autouse=True)
def forgotten():
    """Forgets compiled programs between files once they fill gigabytes."""
    yield
    if "jax" in sys.modules and _resident() > 2 << 30:
        sys.modules["jax"].clear_caches()
        gc.collect()


def _resident() -> int:
    """Bytes of memory in use, where Linux tells them."""
    told = pathlib.Path("/proc/self/statm")
    return int(told.read_text().split()[1]) * resource.getpagesize() if told.exists() else 0
