"""Stochastic weight averaging, as a step hook. Owns its memory, and the view of a state through it."""

import flax.struct
import jax
import jax.numpy as jnp

from trainkit._core.state import TrainState
from trainkit._core.tree import copy_array
from trainkit._core.typing import PyTree
from trainkit.hooks._hook import StepHook, StepValues


@flax.struct.dataclass
class SwaState:
    """Memory of the average.

    Attributes:
        params: mean of the `params` taken; leaves narrower than 32 bits are kept in float32, those that are no floats
            are the last ones taken.
        batch_stats: statistics estimated anew for `params`, `{}` where that is not asked for.
        count: `int32[]`, how many were taken.
        refreshed: `int32[]`, `count` when `batch_stats` was estimated, 0 before.
    """

    params: PyTree
    batch_stats: PyTree
    count: jax.Array
    refreshed: jax.Array


def swa_hook(name: str, start: int, every: int, *, batch_stats: bool) -> StepHook:
    """Returns the hook; see `trainkit.callbacks.SWA` for the arguments."""

    def init(state: TrainState) -> SwaState:
        zero = jnp.zeros((), jnp.int32)
        stats = jax.tree.map(jnp.copy, state.batch_stats) if batch_stats else {}
        return SwaState(jax.tree.map(_start, state.params), stats, zero, jnp.copy(zero))

    def update(memory: SwaState, values: StepValues) -> SwaState:
        step, live = values.state.step, values.state
        due = (step >= start) & ((step - start) % every == 0)
        count = memory.count + jnp.asarray(due, jnp.int32)

        def take(mean: PyTree) -> PyTree:
            return jax.tree.map(lambda old, new: _mean(old, new, count), mean, live.params)

        # Elsewhere than in a branch of its own the sum would be computed at every step.
        params = jax.lax.cond(due, take, lambda mean: mean, memory.params)
        # A layer may give a statistic its final shape at the first update, e.g. [n] -> [1, n].
        stats = memory.batch_stats and jax.tree.map(
            lambda old, new: jnp.broadcast_to(old, new.shape), memory.batch_stats, live.batch_stats
        )
        return SwaState(params, stats, count, memory.refreshed)

    return StepHook(name, init, update)


def view(state: TrainState, memory: SwaState) -> TrainState:
    """Returns `state` with the mean in place of the weights once there is one, and its statistics where they are known.

    Statistics that were estimated for an earlier mean are left out: those of the live weights stay then.
    """
    any_yet, known = memory.count > 0, (memory.refreshed == memory.count) & (memory.count > 0)
    params = jax.tree.map(
        lambda mean, leaf: jnp.where(any_yet, mean.astype(leaf.dtype), leaf), memory.params, state.params
    )
    if not memory.batch_stats:
        return state.replace(params=params)
    stats = jax.tree.map(
        lambda mean, leaf: jnp.where(known, jnp.broadcast_to(mean, leaf.shape), leaf),
        memory.batch_stats,
        state.batch_stats,
    )
    return state.replace(params=params, batch_stats=stats)


def wants_statistics(memory: SwaState) -> bool:
    """Says whether there is a mean, and the statistics are not those of it; waits for the devices."""
    return int(memory.count) > 0 and int(memory.refreshed) != int(memory.count)


def with_statistics(memory: SwaState, batch_stats: PyTree) -> SwaState:
    """Returns the memory with the statistics of its mean."""
    return SwaState(memory.params, batch_stats, memory.count, copy_array(memory.count))


def _is_float(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _start(leaf: jax.Array) -> jax.Array:
    # In bfloat16 or float16 the small steps of a mean of many would round away.
    wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) if _is_float(leaf) else leaf
    return jnp.copy(wide)


def _mean(old: jax.Array, new: jax.Array, count: jax.Array) -> jax.Array:
    if not _is_float(new):
        return new
    return old + (new.astype(old.dtype) - old) / count.astype(old.dtype)
