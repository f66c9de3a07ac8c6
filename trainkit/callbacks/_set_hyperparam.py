"""`SetHyperparam`: sets a hyperparameter of the optimizer to what a function of the user returns."""

import math
import numbers
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from trainkit._core.cadence import Cadence, Every, as_cadence
from trainkit._core.state import TrainState
from trainkit.callbacks._callback import Action, Callback, Phase, Update
from trainkit.callbacks._hyperparams import change, check_changeable, constant
from trainkit.callbacks._info import Info

_EVERY = Every(steps=1)


class SetHyperparam(Callback):
    """Sets a hyperparameter of the optimizer, for the updates after each step at which it is due.

    It changes the value inside the optimizer state, so the optimizer must be made with
    `optax.inject_hyperparams`; nothing compiles again, and the value is in every checkpoint. Each change copies the
    state, so let it be due no more often than the value changes.

    Args:
        name: of the injected hyperparameter, e.g. "learning_rate", "b1", "weight_decay".
        fn: `fn(info) -> float`, called at each step at which `every` is due.
        every: cadence.
        group: pattern of a group of `tk.optim.by_path`, or label of `optax.partition`; None for every place where
            the optimizer has that hyperparameter.

    Raises:
        TypeError: `fn` is no function, `name` or `group` no string, or `every` no cadence; at a step, when `fn`
            returned no number.
        ValueError: at the start of a fit, when the optimizer has no such hyperparameter or group (lists those there
            are), or computes it by a schedule; at a step, when `fn` returned NaN or infinity.

    Example:
        >>> import optax
        >>> tx = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)
        >>> halving = SetHyperparam("learning_rate", lambda info: 1e-3 * 0.5**info.epoch, every=Every(epochs=1))
    """

    phase: ClassVar[Phase] = Phase.MONITOR

    def __init__(
        self,
        name: str,
        fn: Callable[[Info], float],
        *,
        every: Cadence = _EVERY,
        group: str | None = None,
    ) -> None:
        if not isinstance(name, str) or not name:
            raise TypeError(
                f"SetHyperparam({name!r}): expected the name of a hyperparameter, e.g. 'learning_rate'."
            )
        if not callable(fn):
            raise TypeError(
                f"SetHyperparam(fn={fn!r}): expected a function, e.g. lambda info: 0.1 / (1 + info.step)."
            )
        if group is not None and not isinstance(group, str):
            raise TypeError(
                f"SetHyperparam(group={group!r}): expected a pattern of tk.optim.by_path, or None for all groups."
            )
        self.every = as_cadence(every, "every")
        self._name, self._fn, self._group = name, fn, group

    def on_fit_start(self, info: Info) -> Action:
        check_changeable("SetHyperparam", info.state.opt_state, self._name, self._group)

    def on_step(self, info: Info) -> Action:
        value = self._checked(self._fn(info), info.step)

        def set_to(state: TrainState) -> TrainState:
            new = change(state.opt_state, self._name, lambda old: constant(old, value), self._group)
            return state.replace(opt_state=new)

        return Update(set_to)

    def _checked(self, value: Any, step: int) -> float:
        if hasattr(value, "dtype"):
            value = np.asarray(value)
            value = value.item() if value.ndim == 0 else value
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            raise TypeError(
                f"SetHyperparam({self._name!r}): the function returned {type(value).__name__} at step {step}; expected "
                "a float."
            )
        if not math.isfinite(value):
            raise ValueError(
                f"SetHyperparam({self._name!r}): the function returned {value} at step {step}; expected a finite "
                "number. Return the old value where there is no new one."
            )
        return float(value)
