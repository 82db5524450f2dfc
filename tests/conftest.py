"""Every test sees eight CPU devices, so that sharding is exercised wherever it matters."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
