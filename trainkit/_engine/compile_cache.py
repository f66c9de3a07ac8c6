"""Compiled programs kept on disk, so that a program compiled once is not compiled again. Owns the setting.

They are code, and so lie in a folder of the user, not in that of a run, which people copy and send around.
"""

import contextlib
import logging
import pathlib
import secrets
from collections.abc import Iterator
from typing import Any

import jax
import jax.experimental.compilation_cache.compilation_cache as cache
import numpy as np
from jax._src import (
    compilation_cache as jax_cache,
)  # the one way to have JAX keep programs by other rules than its own
from jax.experimental import multihost_utils

from trainkit._engine.program_files import ProgramFiles
from trainkit._engine.user_cache import user_cache

_LOG = logging.getLogger("trainkit")

# A program that compiles in less is compiled again as quickly as it is read.
_LEAST_SECONDS = 0.05

_told: set[str] = set()


@contextlib.contextmanager
def kept_on_disk(wanted: bool, *, processes: int = 1) -> Iterator[None]:
    """Has JAX keep what it compiles in the user's cache; a folder that the user gave JAX stays what it is.

    Args:
        wanted: False changes nothing.
        processes: that run the same programs together. They use the folder where all of them see the same one: what
            one finds and another compiles may be unlike (autotuning measures), or wait for the other for ever.
    """
    folder = _folder() if wanted else None
    if wanted and processes > 1 and not _is_shared(folder):
        folder = None
    if folder is None:
        yield
        return
    ours = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": _LEAST_SECONDS,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in ours}
    _use(ours)
    # JAX has no public way to be given a cache. In this order: a thread that compiles meanwhile finds none, or ours.
    jax_cache._cache = ProgramFiles(folder)
    jax_cache._cache_initialized = True
    try:
        yield
    finally:
        _use(before)


def _folder() -> pathlib.Path | None:
    config: Any = jax.config
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return None
    try:
        return user_cache()
    except OSError as error:
        if str(error) not in _told:
            _told.add(str(error))
            _LOG.warning("compiled programs are not kept: %s %s.", error.filename, error.strerror)
        return None


def _is_shared(folder: pathlib.Path | None) -> bool:
    """Says whether all processes have the same folder; all must ask."""
    # A name that was never looked up, so that no file system answers from memory; 0 for none.
    token = secrets.randbelow(2**31 - 1) + 1
    if jax.process_index() or folder is None or not _mark(folder, token):
        token = 0
    token = int(multihost_utils.broadcast_one_to_all(np.int32(token)))
    if not token:
        return False
    seen = folder is not None and _mark_in(folder, token).exists()
    everyone = np.asarray(multihost_utils.process_allgather(np.int32(seen)))
    if jax.process_index() == 0 and folder is not None:
        _mark_in(folder, token).unlink(missing_ok=True)
    return bool(everyone.all())


def _mark(folder: pathlib.Path, token: int) -> bool:
    try:
        _mark_in(folder, token).touch(mode=0o600, exist_ok=False)
    except OSError:
        return False
    return True


def _mark_in(folder: pathlib.Path, token: int) -> pathlib.Path:
    return folder / f".seen-{token:x}"


def _use(settings: dict[str, object]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    cache.reset_cache()  # it looks at its folder once
