"""Exponential moving average of the weights, as a step hook. Owns its memory and the view of a state through it."""

import flax.struct
import jax
import jax.numpy as jnp

from trainkit._core.state import TrainState
from trainkit._core.typing import PyTree
from trainkit.hooks._hook import StepHook, StepValues


@flax.struct.dataclass
class EmaState:
    """Memory of the average.

    Attributes:
        params: running average of `params`; leaves narrower than 32 bits are kept in float32.
        batch_stats: running average of `batch_stats`, `{}` when it is not averaged.
        count: `int32[]`, updates seen.
        decay: static.
        debias: static; the averages start at zero and are divided by `1 - decay**count` when read.
    """

    params: PyTree
    batch_stats: PyTree
    count: jax.Array
    decay: float = flax.struct.field(pytree_node=False)
    debias: bool = flax.struct.field(pytree_node=False)


def ema_hook(name: str, decay: float, *, debias: bool, batch_stats: bool) -> StepHook:
    """Returns the hook; see `trainkit.callbacks.EMA` for the arguments."""

    def init(state: TrainState) -> EmaState:
        return EmaState(
            params=_start(state.params, debias),
            batch_stats=_start(state.batch_stats, debias) if batch_stats else {},
            count=jnp.zeros((), jnp.int32),
            decay=decay,
            debias=debias,
        )

    def update(memory: EmaState, values: StepValues) -> EmaState:
        state = values.state
        return EmaState(
            params=_average(memory.params, state.params, decay),
            batch_stats=_average(memory.batch_stats, state.batch_stats, decay) if batch_stats else {},
            count=memory.count + 1,
            decay=decay,
            debias=debias,
        )

    return StepHook(name, init, update)


def view(state: TrainState, memory: EmaState) -> TrainState:
    """Returns `state` with the averages in place of the weights (and of `batch_stats` where averaged)."""
    params = _read(memory, memory.params, state.params)
    stats = _read(memory, memory.batch_stats, state.batch_stats) if memory.batch_stats else state.batch_stats
    return state.replace(params=params, batch_stats=stats)


def _is_float(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _start(tree: PyTree, debias: bool) -> PyTree:
    def start(leaf: jax.Array) -> jax.Array:
        if not _is_float(leaf):
            return jnp.copy(leaf)
        # In bfloat16 or float16 the small steps of a slow average would round away.
        wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
        return jnp.zeros_like(wide) if debias else jnp.copy(wide)

    return jax.tree.map(start, tree)


def _average(average: PyTree, tree: PyTree, decay: float) -> PyTree:
    def blend(old: jax.Array, new: jax.Array) -> jax.Array:
        if not _is_float(new):
            return jnp.copy(new)
        # A layer may give a statistic its final shape at the first update, e.g. [n] -> [1, n].
        return decay * jnp.broadcast_to(old, new.shape) + (1 - decay) * new.astype(old.dtype)

    return jax.tree.map(blend, average, tree)


def _read(memory: EmaState, average: PyTree, live: PyTree) -> PyTree:
    def read(mean: jax.Array, leaf: jax.Array) -> jax.Array:
        if not _is_float(leaf):
            return mean
        if memory.debias:
            seen = memory.count > 0
            weight = 1 - memory.decay ** jnp.maximum(memory.count, 1).astype(mean.dtype)
            mean = jnp.where(seen, mean / weight, leaf.astype(mean.dtype))
        return mean.astype(leaf.dtype)

    return jax.tree.map(read, average, live)
