"""How much memory a training step takes between its arguments and its results, told before XLA starts.

Owns the estimate, and what it decides about the allocator; traces and runs nothing on a device.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax

from trainkit._allocator import LARGEST_OF_A_THREAD, has_started, keep_freed_memory, only_cpu, use_one_arena
from trainkit._jaxprs import peak_bytes
from trainkit._step import Steps
from trainkit._typing import Batch


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
    state = jax.eval_shape(steps.init, jax.eval_shape(lambda: jax.random.key(0)), spec)
    return peak_bytes(steps.trace(state, spec).jaxpr.jaxpr)


def _spec(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))
