"""Compiled programs stay on disk."""

import os
import pathlib

import jax


def keep_compiled() -> None:
    """Keeps what is compiled from now on for later processes, and uses what earlier ones kept.

    A run that goes on after it was stopped, the next seed and the next recipe then begin at once.
    Programs lie in JAX_COMPILATION_CACHE_DIR, which several hosts may share; if it is not set, in
    the user's own cache, $XDG_CACHE_HOME or ~/.cache. JAX_ENABLE_COMPILATION_CACHE=0 keeps none.
    JAX tells programs apart by their text, devices, options and version; whoever may write there
    can run code as this user.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    place = pathlib.Path(cache, "distill_jax", "compiled")
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written to
        return
    jax.config.update("jax_compilation_cache_dir", str(place))
    # Small models have many programs that take less than JAX's second.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
