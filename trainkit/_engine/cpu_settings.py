"""Settings of the CPU: glibc keeps the memory that XLA frees, in the way that suits the training step.

XLA allocates its temporary buffer afresh for each execution. Blocks over 32 MB come from `mmap` and go back to
the kernel, so each step touches all of its temporary memory for the first time again. Owns these settings and the
estimate that they follow from; traces and runs nothing on a device.
"""

import contextlib
import ctypes
import importlib.util
import os
import platform
import sys
from collections.abc import Callable
from typing import Any

import jax
from jax._src import xla_bridge  # the one place that tells whether JAX has started without starting it

from trainkit._core.jaxprs import peak_bytes
from trainkit._core.typing import Batch
from trainkit._step.steps import Steps

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


def set_up_cpu(steps: Steps, batch: Callable[[], Batch | None]) -> None:
    """Has glibc keep what XLA frees on a CPU, in the way that suits the training step.

    Where the step takes a block that the arena of a thread can't hold, all threads are given one arena: that is
    decided at their first allocation, so nothing is done about it once JAX has started.

    Args:
        steps: of the trainer.
        batch: returns a batch, or its shapes and dtypes; None where there is none to be had.
    """
    if has_started():
        if jax.default_backend() == "cpu":
            keep_freed_memory()
    elif only_cpu() and keep_freed_memory():
        # What is wrong with the batch or the loss is told where they are used.
        with contextlib.suppress(Exception):
            first = batch()
            if first is not None and step_bytes(steps, first) > LARGEST_OF_A_THREAD:
                use_one_arena()


def step_bytes(steps: Steps, batch: Batch) -> int:
    """Returns about how many bytes a training step on one device holds at most, arguments and results left out.

    XLA fuses operations and shares buffers among them, which goes both ways: for a CNN, a ResNet and a transformer
    the estimate is 0.9, 1.05 and 1.4 of the temporary memory that XLA plans.

    Args:
        steps: of the trainer.
        batch: leaves `[batch, ...]` with shape and dtype.
    """
    spec = jax.tree.map(_spec, batch)
    state = jax.eval_shape(
        steps.init, steps.constants.spec(), jax.eval_shape(lambda: jax.random.key(0)), spec
    )
    return peak_bytes(steps.trace(state, spec).jaxpr.jaxpr)


def _spec(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))
