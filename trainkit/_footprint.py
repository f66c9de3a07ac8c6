"""How much memory a training step takes between its arguments and its results, told before XLA starts.

Owns the estimate, and what it decides about the allocator; traces and runs nothing on a device.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend.core as jex

from trainkit._allocator import LARGEST_OF_A_THREAD, has_started, keep_freed_memory, only_cpu, use_one_arena
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
    return _peak(steps.trace(state, spec).jaxpr.jaxpr)


def _spec(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))


def _peak(jaxpr: Any) -> int:
    """Returns the most bytes of values alive at once, each from the operation that makes it to its last reader."""
    last = {var: index for index, eqn in enumerate(jaxpr.eqns) for var in _variables(eqn.invars)}
    results = set(_variables(jaxpr.outvars))
    alive: dict[Any, int] = {}
    held = most = 0
    for index, eqn in enumerate(jaxpr.eqns):
        made = {var: _bytes(var) for var in eqn.outvars}
        inside = max(map(_peak, jex.jaxprs_in_params(eqn.params)), default=0)
        most = max(most, held + max(inside, sum(made.values())))
        for var in made.keys() & last.keys() - results:
            alive[var] = made[var]
            held += made[var]
        for var in set(_variables(eqn.invars)):
            if last[var] == index:
                held -= alive.pop(var, 0)
    return most


def _variables(atoms: Any) -> Iterator[Any]:
    return (atom for atom in atoms if not isinstance(atom, jex.Literal))


def _bytes(var: Any) -> int:
    aval = var.aval
    return aval.size * getattr(aval.dtype, "itemsize", 0) if hasattr(aval, "dtype") else 0
