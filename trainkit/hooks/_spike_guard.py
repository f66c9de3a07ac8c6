"""The guard against updates far out of the usual, as a step hook. Owns its memory and the rule of refusing."""

from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
import optax

from trainkit._core.state import TrainState
from trainkit.hooks._hook import StepHook, StepValues
from trainkit.hooks._loss_scale import NAME as LOSS_SCALE

Of = Literal["loss", "grad_norm"]


@flax.struct.dataclass
class SpikeGuardState:
    """Memory of the guard.

    Attributes:
        window: `float32[window]`, the values accepted last, in a ring.
        record: `int32[4]`: how many were accepted since the window began, refusals in a row, refusals so far, and
            whether the last update was one. One array, for each costs time at every call.
    """

    window: jax.Array
    record: jax.Array

    @property
    def refused(self) -> jax.Array:
        """`int32[]`, updates refused so far."""
        return self.record[2]


def spike_guard_hook(name: str, *, factor: float, window: int, of: Of, patience: int) -> StepHook:
    """Returns the hook; see `trainkit.callbacks.SpikeGuard` for the arguments."""

    def init(state: TrainState) -> SpikeGuardState:
        return SpikeGuardState(jnp.zeros((window,), jnp.float32), jnp.zeros((4,), jnp.int32))

    def update(memory: SpikeGuardState, values: StepValues) -> SpikeGuardState:
        value = _value(values, of)
        accepted, in_row, so_far, _ = memory.record
        refused = (
            (accepted >= window) & (value > factor * _median(memory.window)) & _may_refuse(values, value)
        )
        # What is no number is above nothing, and no level either.
        enters = ~refused & jnp.isfinite(value)
        in_row = jnp.where(refused, in_row + 1, jnp.where(enters, 0, in_row))
        afresh = in_row >= patience
        ring = memory.window.at[accepted % window].set(
            jnp.where(enters, value, memory.window[accepted % window])
        )
        count = jnp.where(afresh, 0, accepted + enters)
        # Kept within the ring, so that it never overflows: `window` says full.
        count = jnp.where(count >= 2 * window, count - window, count)
        record = [count, jnp.where(afresh, 0, in_row), so_far + refused, refused]
        return SpikeGuardState(ring, jnp.stack([one.astype(jnp.int32) for one in record]))

    def admit(memory: SpikeGuardState, values: StepValues) -> jax.Array:
        return memory.record[3] == 0

    return StepHook(name, init, update, admit)


def _median(window: jax.Array) -> jax.Array:
    ordered, middle = jnp.sort(window), len(window) // 2
    return ordered[(len(window) - 1) // 2] / 2 + ordered[middle] / 2


def _value(values: StepValues, of: Of) -> jax.Array:
    if of == "loss":
        if not values.has_loss:
            raise ValueError(
                "SpikeGuard(of='loss'): this trainer has its own train_step, which returns no output 'loss'. Return "
                "it, or leave the callback out."
            )
        return values.loss.astype(jnp.float32)
    if values.grads is None:
        raise ValueError(
            "SpikeGuard(of='grad_norm'): this trainer has its own train_step, which tells no gradients. Use of='loss', "
            "and return 'loss' among the outputs."
        )
    return jnp.asarray(optax.tree.norm(values.grads), jnp.float32)


def _may_refuse(values: StepValues, value: jax.Array) -> jax.Array:
    """Says whether a value is this guard's affair: what overflows under a loss scale is that scale's."""
    assert values.before is not None  # the step always tells
    return jnp.isfinite(value) if LOSS_SCALE in values.before.hooks else jnp.bool_(True)
