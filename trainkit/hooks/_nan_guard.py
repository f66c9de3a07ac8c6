"""The guard against steps that are not finite, as a step hook. Owns its memory, what it checks and the names."""

import flax.struct
import jax
import jax.numpy as jnp

from trainkit._core.state import TrainState
from trainkit._core.tree import named_leaves
from trainkit._core.typing import PyTree
from trainkit.hooks._hook import StepHook, StepValues
from trainkit.hooks._loss_scale import NAME as LOSS_SCALE
from trainkit.hooks._loss_scale import LossScale


@flax.struct.dataclass
class NanGuardState:
    """Memory of the guard.

    Attributes:
        record: `int32[3]`: `bad_step`, `bad_leaf` and `skipped`. One array, for each costs time at every call.
    """

    record: jax.Array

    @property
    def bad_step(self) -> jax.Array:
        """`int32[]`, the step that was not finite, 0 for none: the first where the guard holds, else the last."""
        return self.record[0]

    @property
    def bad_leaf(self) -> jax.Array:
        """`int32[]`, index into `leaf_names` of its first leaf that was not finite."""
        return self.record[1]

    @property
    def skipped(self) -> jax.Array:
        """`int32[]`, updates refused so far."""
        return self.record[2]


def nan_guard_hook(name: str, *, hold: bool) -> StepHook:
    """Returns the hook that refuses updates which are not finite.

    Args:
        name: key in `state.hooks`.
        hold: refuse every update from the first such one on, so that the state stays the one before it.
    """

    def update(memory: NanGuardState, values: StepValues) -> NanGuardState:
        bad, leaf = _first(values)
        step, old = values.state.step, memory.bad_step
        if hold:
            is_new, refused = bad & (old == 0), bad | (old > 0)
        else:
            # A state whose step was set back must not meet the number of an earlier bad step again.
            is_new, refused, old = bad, bad, jnp.where(old >= step, 0, old)
        return NanGuardState(
            jnp.stack(
                [
                    jnp.where(is_new, step, old),
                    jnp.where(is_new, leaf, memory.bad_leaf),
                    memory.skipped + refused.astype(jnp.int32),
                ]
            )
        )

    def admit(memory: NanGuardState, values: StepValues) -> jax.Array:
        return memory.bad_step == 0 if hold else memory.bad_step != values.state.step

    return StepHook(name, lambda state: NanGuardState(jnp.zeros((3,), jnp.int32)), update, admit)


def forget(state: TrainState, name: str) -> TrainState:
    """Returns `state` with a guard that holds no longer; the count of refused updates stays."""
    memory: NanGuardState = state.hooks[name]
    return state.replace(hooks={**state.hooks, name: NanGuardState(memory.record.at[:2].set(0))})


def leaf_names(state: TrainState) -> list[str]:
    """Returns the names of all that may be checked, in the order in which the first is sought."""
    trees = ({"grads": state.params}, {"params": state.params}, state.model_state)
    return ["loss", *(name for tree in trees for name, leaf in named_leaves(tree) if _is_float(leaf))]


def not_finite(values: StepValues) -> dict[str, jax.Array]:
    """Returns `bool[]` for each leaf checked: loss, gradients, model state; without gradients the parameters.

    A model state that was not finite before, such as a running minimum that starts at infinity, passes.
    """
    before, state = values.before, values.state
    assert before is not None  # the step always tells
    found = {"loss": ~jnp.isfinite(values.loss)} if values.has_loss else {}
    if values.grads is None:
        found |= _turned({"params": before.params}, {"params": state.params})
    else:
        scale: LossScale | None = before.hooks.get(LOSS_SCALE)
        for name, leaf in named_leaves({"grads": values.grads}):
            found[name] = ~jnp.isfinite(leaf).all()
            if scale is not None:
                # An overflow is the loss scale's to deal with, as long as it can be lowered.
                found[name] &= scale.scale <= 1
    return found | _turned(before.model_state, state.model_state)


def _first(values: StepValues) -> tuple[jax.Array, jax.Array]:
    """Returns `bool[]`, whether anything is not finite, and `int32[]`, the index of the first such leaf."""
    found = not_finite(values)
    place = {name: index for index, name in enumerate(leaf_names(values.state))}
    places = jnp.asarray([place[name] for name in found], jnp.int32)
    flags = jnp.stack(list(found.values()))
    return flags.any(), places[jnp.argmax(flags)]


def _turned(before: PyTree, after: PyTree) -> dict[str, jax.Array]:
    pairs = zip(named_leaves(before), named_leaves(after), strict=True)
    return {
        name: ~(jnp.isfinite(new) | ~jnp.isfinite(jnp.broadcast_to(old, new.shape))).all()
        for (_, old), (name, new) in pairs
        if _is_float(new)
    }


def _is_float(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)
