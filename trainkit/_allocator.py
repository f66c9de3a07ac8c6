"""Tells glibc to keep the memory that XLA frees after every execution on the CPU. Owns these settings alone.

XLA allocates its temporary buffer afresh for each execution. Blocks over 32 MB come from `mmap` and go back to
the kernel, so each step touches all of its temporary memory for the first time again.
"""

import ctypes
import importlib.util
import os
import platform
import sys
from typing import Any

import jax
from jax._src import xla_bridge  # the one place that tells whether JAX has started without starting it

SWITCH = "TRAINKIT_CPU_SETTINGS"
"""Environment variable; `0` leaves the allocator and the scheduler as they are."""

LARGEST_OF_A_THREAD = 48 * 2**20
"""Bytes of blocks that an arena of a thread surely holds; its heaps have 64 MiB, and larger blocks are mapped."""

# From <malloc.h>: parameter, value.
_TRIM_THRESHOLD = (-1, 2**31 - 1)
_MMAP_THRESHOLD = (-3, 1 << 30)
_ARENA_MAX = (-8, 1)

_kept = _one_arena = False


def switched_on() -> bool:
    """Says whether the environment allows settings of the CPU."""
    return os.environ.get(SWITCH, "1") != "0"


def only_cpu() -> bool:
    """Says whether JAX can only run on the CPU, without starting it: what is asked for, else what is installed."""
    config: Any = jax.config
    platforms: str | None = config.jax_platforms
    if platforms:
        return platforms.split(",")[0] == "cpu"
    return all(importlib.util.find_spec(name) is None for name in ("jax_plugins", "libtpu"))


def has_started() -> bool:
    """Says whether JAX has started its backend, and with it its threads."""
    return xla_bridge.backends_are_initialized()


def keep_freed_memory() -> bool:
    """Sets thresholds up to which freed blocks are kept; returns whether they are set: Linux with glibc only."""
    global _kept
    if not _kept and sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        _kept = all([_set(*setting) for setting in (_MMAP_THRESHOLD, _TRIM_THRESHOLD)])  # noqa: C419 - none is left out
    return _kept


def use_one_arena() -> None:
    """Has all threads that come share one arena, whose blocks may have any size.

    Threads then wait for each other where they allocate much that is small: tiny steps and compilations take longer.
    """
    global _one_arena
    _one_arena = _one_arena or _set(*_ARENA_MAX)


def arena_is_shared() -> bool:
    """Says whether `use_one_arena` was called."""
    return _one_arena


def describe_allocator() -> str:
    """Returns in a few words how the allocator is set."""
    if not _kept:
        return "as it was"
    return "keeps freed memory, in one arena" if _one_arena else "keeps freed memory"


def _set(parameter: int, value: int) -> bool:
    return bool(ctypes.CDLL(None).mallopt(parameter, value))
