"""Tells glibc to keep the memory that XLA frees after every execution on the CPU. Owns that setting alone.

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

SWITCH = "TRAINKIT_CPU_SETTINGS"
"""Environment variable; `0` leaves the allocator and the scheduler as they are."""

# From <malloc.h>: parameter, value.
_TRIM_THRESHOLD = (-1, 2**31 - 1)
_MMAP_THRESHOLD = (-3, 1 << 30)
# One arena: else each thread of XLA has its own, whose large blocks go back to the kernel whatever the thresholds.
# A thread keeps the arena of its first allocation, so this is to be set before XLA starts.
_ARENA_MAX = (-8, 1)

_applied = False


def switched_on() -> bool:
    """Says whether the environment allows settings of the CPU."""
    return os.environ.get(SWITCH, "1") != "0"


def freed_memory_is_kept() -> bool:
    """Says whether `keep_freed_memory` has been called, and could set what it sets."""
    return _applied


def only_cpu() -> bool:
    """Says whether JAX can only run on the CPU, without starting it: what is asked for, else what is installed."""
    config: Any = jax.config
    platforms: str | None = config.jax_platforms
    if platforms:
        return platforms.split(",")[0] == "cpu"
    return all(importlib.util.find_spec(name) is None for name in ("jax_plugins", "libtpu"))


def keep_freed_memory() -> bool:
    """Sets the thresholds once per process; returns whether they are set: Linux with glibc only."""
    global _applied
    if not _applied and sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        settings = (_MMAP_THRESHOLD, _TRIM_THRESHOLD, _ARENA_MAX)
        _applied = all([libc.mallopt(*setting) for setting in settings])  # noqa: C419 - none is left out
    return _applied
