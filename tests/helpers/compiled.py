"""Compiled programs kept on disk while tests run, where many trainers are made of the same programs."""

import contextlib

import jax
import jax.experimental.compilation_cache.compilation_cache as cache


@contextlib.contextmanager
def kept_in(folder):
    """Has JAX keep all that it compiles in `folder`, however quick that was."""
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    cache.reset_cache()
