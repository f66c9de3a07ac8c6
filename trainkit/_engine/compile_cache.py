"""Compiled programs kept on disk, so that a run started again does not wait for the compiler. Owns the setting."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.experimental.compilation_cache.compilation_cache as cache

FOLDER = "compiled"
"""Name of the folder within a run's `logdir`."""

# A program that compiles in less is compiled again as quickly as it is read.
_LEAST_SECONDS = 0.05


@contextlib.contextmanager
def kept_on_disk(logdir: pathlib.Path | None) -> Iterator[None]:
    """Has JAX keep what it compiles in `logdir`; a folder that the user gave JAX stays what it is.

    Args:
        logdir: of the run; None keeps nothing.
    """
    config: Any = jax.config
    if logdir is None or config.jax_compilation_cache_dir:
        yield
        return
    if jax.process_index() and not (logdir / FOLDER).is_dir():
        yield  # of several processes the first writes; the others read what is there
        return
    ours = {
        "jax_compilation_cache_dir": str(logdir.absolute() / FOLDER),
        "jax_persistent_cache_min_compile_time_secs": _LEAST_SECONDS,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in ours}
    _use(ours)
    try:
        yield
    finally:
        _use(before)


def _use(settings: dict[str, object]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    cache.reset_cache()  # it looks at its folder once
