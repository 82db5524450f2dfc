"""Every test sees eight CPU devices, so that sharding is exercised wherever it matters.

All processes of a run of the tests, those that tests start among them, share what they compile:
most of the time goes there, and recipes are run several times.
"""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Threads of XLA: in a collective each device holds one, and others must be left to compute.
os.environ.setdefault("NPROC", "16")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="distill_jax-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
