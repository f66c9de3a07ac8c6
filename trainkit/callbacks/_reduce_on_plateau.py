"""`ReduceOnPlateau`: lowers the learning rate when a metric no longer improves."""

import logging
from typing import Any, ClassVar, Literal

import jax

from trainkit._core.state import TrainState
from trainkit.callbacks._callback import Action, Callback, Phase, Update
from trainkit.callbacks._hyperparams import change, check_changeable, scale
from trainkit.callbacks._info import Info
from trainkit.callbacks._monitor import EPOCH, EVALUATION, Monitor, check_count

_LOGGER = logging.getLogger("trainkit")


class ReduceOnPlateau(Callback):
    """Multiplies the learning rate by `factor` after `patience` evaluations in a row without improvement.

    It changes the hyperparameter inside the optimizer state, so the optimizer must be made with
    `optax.inject_hyperparams`; nothing compiles again, and the change is in every checkpoint. Counts as
    `optax.contrib.reduce_on_plateau` does. Improvement, further fits, other runs and resuming are as in
    `EarlyStopping`.

    Args:
        monitor: full name of a metric, e.g. `eval/loss`.
        mode: "min" or "max"; None where the metric is registered with a direction.
        factor: float in (0, 1).
        patience: int >= 1.
        cooldown: int >= 0, evaluations after a reduction during which none is counted.
        min_delta: float >= 0, by how much a value must be better than the best.
        min_lr: float >= 0, below which the learning rate is not reduced.
        hyperparam: name of the hyperparameter, wherever in the optimizer state it is injected.

    Raises:
        ValueError: an argument is out of range; at the start of a fit, when the optimizer has no such
            hyperparameter or computes it by a schedule, or for a reason that `EarlyStopping` gives.

    Example:
        >>> import optax
        >>> tx = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)
        >>> plateau = ReduceOnPlateau("eval/loss", mode="min", factor=0.5, patience=3)
    """

    phase: ClassVar[Phase] = Phase.MONITOR

    def __init__(
        self,
        monitor: str,
        *,
        mode: Literal["min", "max"] | None = None,
        factor: float = 0.1,
        patience: int = 5,
        cooldown: int = 0,
        min_delta: float = 0.0,
        min_lr: float = 0.0,
        hyperparam: str = "learning_rate",
    ) -> None:
        self._monitor = Monitor("ReduceOnPlateau", monitor, mode=mode, min_delta=min_delta)
        if not 0 < factor < 1:
            raise ValueError(f"ReduceOnPlateau(factor={factor!r}): must lie between 0 and 1, both excluded.")
        why = "with less every evaluation would reduce"
        check_count("ReduceOnPlateau", "patience", patience, least=1, why=why)
        check_count("ReduceOnPlateau", "cooldown", cooldown, least=0, why="it is a number of evaluations")
        if not min_lr >= 0:
            raise ValueError(f"ReduceOnPlateau(min_lr={min_lr!r}): must be 0 or more.")
        self._factor, self._patience, self._cooldown, self._min_lr = factor, patience, cooldown, min_lr
        self._hyperparam = hyperparam
        self._count = 0
        self._cooling = 0

    def on_fit_start(self, info: Info) -> Action:
        self._monitor.start(info)
        check_changeable("ReduceOnPlateau", info.state.opt_state, self._hyperparam)

    def on_eval_end(self, info: Info) -> Action:
        return self._look(info, EVALUATION)

    def on_epoch_end(self, info: Info) -> Action:
        return self._look(info, EPOCH)

    def state_dict(self) -> dict[str, Any]:
        return {**self._monitor.state_dict(), "count": self._count, "cooling": self._cooling}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._monitor.load_state_dict(state)
        self._count, self._cooling = state["count"], state["cooling"]

    def reset(self) -> None:
        self._monitor.reset()
        self._count = self._cooling = 0

    def _look(self, info: Info, hook: str) -> Action:
        value = self._monitor.value(info, hook)
        if value is None:
            return None
        improved = self._monitor.improved(value, info.step)
        if self._cooling > 0:
            self._cooling -= 1
            return None
        self._count = 0 if improved else self._count + 1
        if self._count < self._patience:
            return None
        _LOGGER.info("%s times %g: %s", self._hyperparam, self._factor, self._monitor.since_best(self._count))
        self._count, self._cooling = 0, self._cooldown
        return Update(self._reduce)

    def _reduce(self, state: TrainState) -> TrainState:
        def reduce(value: jax.Array) -> jax.Array:
            return scale(value, self._factor, least=self._min_lr)

        return state.replace(opt_state=change(state.opt_state, self._hyperparam, reduce))
