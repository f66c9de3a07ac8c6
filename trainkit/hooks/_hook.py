"""The step hook: a pure pair of functions that a callback has traced into the compiled training step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from trainkit._state import TrainState
from trainkit._typing import PyTree


class StepValues(NamedTuple):
    """What a hook's `update` is told of the step it is traced into.

    Attributes:
        state: the `TrainState` after the optimizer update; its `hooks` are those from before.
        loss: `float32[]`, the mean loss over the real examples.
        grads: gradients of the structure of `params`; None where `train_step` is overridden.
    """

    state: TrainState
    loss: jax.Array
    grads: PyTree


class StepHook(NamedTuple):
    """A pure pair with memory in `state.hooks[name]`.

    Attributes:
        name: key of its memory in `state.hooks`, unique among the callbacks of a trainer.
        init: `init(state) -> memory`, a pytree of arrays.
        update: `update(memory, values) -> memory`, once per optimizer update, of the same structure.

    Example:
        >>> import jax.numpy as jnp
        >>> worst = StepHook(
        ...     "worst_loss",
        ...     init=lambda state: jnp.zeros((), jnp.float32),
        ...     update=lambda memory, values: jnp.maximum(memory, values.loss),
        ... )
    """

    name: str
    init: Callable[[TrainState], Any]
    update: Callable[[Any, StepValues], Any]


def init_hooks(hooks: tuple[StepHook, ...], state: TrainState) -> TrainState:
    """Returns `state` with the memory of each hook initialised."""
    return state.replace(hooks={hook.name: hook.init(state) for hook in hooks})


def update_hooks(hooks: tuple[StepHook, ...], values: StepValues) -> TrainState:
    """Returns `values.state` with the memory of each hook updated."""
    memory = values.state.hooks
    updated = {hook.name: hook.update(memory[hook.name], values) for hook in hooks}
    return values.state.replace(hooks={**memory, **updated})
