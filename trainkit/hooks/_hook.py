"""The step hook: a pure pair of functions that a callback has traced into the compiled training step."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trainkit._core.state import TrainState
from trainkit._core.typing import PyTree
from trainkit.hooks._passes import StepPasses


class StepValues(NamedTuple):
    """What a hook's `update` is told of the step it is traced into.

    Attributes:
        state: the `TrainState` after the optimizer update; its `hooks` are those from before.
        loss: `float32[]`, the mean loss over the real examples.
        grads: gradients of the structure of `params`; None where `train_step` is overridden.
        before: the `TrainState` before the update; None only where a hook is called outside of a step.
        has_loss: static; False where an overridden `train_step` returned no `loss`, which is NaN then.
        passes: answers what probes ask beyond that; None in a step hook.
    """

    state: TrainState
    loss: jax.Array
    grads: PyTree
    before: TrainState | None = None
    has_loss: bool = True
    passes: StepPasses | None = None

    @property
    def updates(self) -> PyTree:
        """What the step added to `params`; in a probe 0 where the update was refused or skipped."""
        assert self.before is not None  # the step always tells
        return jax.tree.map(lambda new, old: new - old, self.state.params, self.before.params)

    @property
    def batch(self) -> Any:
        """The batch, leaves `[rows, ...]`, whole on every replica; a tuple of them where gradients are accumulated.

        Raises:
            AttributeError: asked by a step hook.
        """
        return self._asked("batch").batch

    @property
    def mask(self) -> Any:
        """`bool[rows]`, which rows of the batch are real; a tuple where gradients are accumulated.

        Raises:
            AttributeError: asked by a step hook.
        """
        return self._asked("mask").mask

    def _asked(self, what: str) -> StepPasses:
        if self.passes is None:
            raise AttributeError(
                f"values.{what} is told to probes (Callback.step_probe, tk.callbacks.Probe), not to step hooks: these "
                "run in every step, and would keep the batch alive in all of them."
            )
        return self.passes


class StepHook(NamedTuple):
    """A pure pair with memory in `state.hooks[name]`, and perhaps a say in whether an update is kept.

    Attributes:
        name: key of its memory in `state.hooks`, unique among the callbacks of a trainer.
        init: `init(state) -> memory`, a pytree of arrays.
        update: `update(memory, values) -> memory`, once per optimizer update, of the same structure.
        admit: `admit(memory, values) -> bool[]`, whether the update is kept, asked with the memory that `update`
            returned. Where any hook says False, the state and the metrics stay as they were before the step, but
            for `step`, which counts on, and the memory of the hooks with an `admit`. None to have no say, which
            costs nothing.

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
    admit: Callable[[Any, StepValues], jax.Array] | None = None


def init_hooks(hooks: tuple[StepHook, ...], state: TrainState) -> TrainState:
    """Returns `state` with the memory of each hook initialised."""
    return state.replace(hooks={hook.name: hook.init(state) for hook in hooks})


def update_hooks(hooks: tuple[StepHook, ...], values: StepValues) -> TrainState:
    """Returns `values.state` with the memory of each hook updated."""
    memory = values.state.hooks
    updated = {hook.name: hook.update(memory[hook.name], values) for hook in hooks}
    return values.state.replace(hooks={**memory, **updated})


def admitted(hooks: tuple[StepHook, ...], memory: Mapping[str, Any], values: StepValues) -> jax.Array | None:
    """Returns `bool[]`, whether every hook that has a say keeps the update; None where none has.

    Args:
        hooks: of the step.
        memory: of all hooks by name, after their `update`.
        values: as `update` got them.
    """
    verdicts = [hook.admit(memory[hook.name], values) for hook in hooks if hook.admit is not None]
    return functools.reduce(jnp.logical_and, verdicts) if verdicts else None
