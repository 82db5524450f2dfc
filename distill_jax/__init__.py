"""Turn a large Llama into a small one on JAX, the way Llama 3.2 1B and 3B were made."""

__version__ = "0.1.0"
