"""`OptunaPrune`: tells a trial of Optuna how a fit goes, and ends the fit where the trial is to be pruned.

Owns no search: which values are tried and what is pruned is Optuna's.
"""

from typing import Any, ClassVar, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from trainkit.callbacks._callback import Action, Callback, Phase, Stop
from trainkit.callbacks._info import Info
from trainkit.callbacks._monitor import EPOCH, EVALUATION, Monitor


class Trial(Protocol):
    """What is asked of a trial: `optuna.trial.Trial` has it."""

    def report(self, value: float, step: int) -> None: ...

    def should_prune(self) -> bool: ...


class OptunaPrune(Callback):
    """Reports a metric to a trial of Optuna, by step, and stops the fit where the trial is to be pruned.

    The fit returns as any that is stopped: logs are closed, a checkpoint is there, and `result.stopped_by` says that it
    was pruned. `raise_if_pruned()` after it tells Optuna. Metrics of an evaluation are reported after each evaluation,
    `train/...` metrics at the end of each pass. Of several processes the first has the trial; give the others None.

    Args:
        trial: an `optuna.trial.Trial`; all that is asked of it is `report(value, step)` and `should_prune()`.
        name: full name of a metric, e.g. `eval/loss`. Which way is better the study knows.

    Attributes:
        pruned: why the fit was stopped, None where it was not.

    Raises:
        TypeError: `trial` lacks one of the two methods, or `name` is not a str.
        ValueError: at the start of a fit, when the name can't appear in it; at the first evaluation, when it did not
            appear, with the names there are.

    Example:
        >>> def objective(trial):
        ...     pruning = OptunaPrune(trial, "eval/loss")
        ...     result = make_trainer(trial.suggest_float("lr", 1e-4, 1e-1), [pruning]).fit(data, epochs=5)
        ...     pruning.raise_if_pruned()
        ...     return result.metrics["eval/loss"].last
    """

    phase: ClassVar[Phase] = Phase.MONITOR

    def __init__(self, trial: Trial | None, name: str) -> None:
        missing = [
            method for method in ("report", "should_prune") if not callable(getattr(trial, method, None))
        ]
        if missing and not (trial is None and jax.process_index()):
            raise TypeError(
                f"OptunaPrune(trial={trial!r}) needs the methods report(value, step) and should_prune(), and "
                f"{' and '.join(missing)} is not there. Pass what Optuna hands to the objective."
            )
        if not isinstance(name, str):
            raise TypeError(
                f"OptunaPrune(name={name!r}): expected the full name of a metric, e.g. 'eval/loss'."
            )
        self._trial = trial
        self._monitor = Monitor("OptunaPrune", name, mode="min", min_delta=0.0)
        self._reported = 0
        self._resumed = False
        self.pruned: str | None = None

    def on_fit_start(self, info: Info) -> None:
        self._monitor.start(info)
        self.reads_epoch = self._monitor.unit == "epochs"
        # A fit that is resumed where it was pruned is over at once, and pruned.
        self.pruned, self._resumed = self.pruned if self._resumed else None, False

    def on_eval_end(self, info: Info) -> Action:
        return self._look(info, EVALUATION)

    def on_epoch_end(self, info: Info) -> Action:
        return self._look(info, EPOCH)

    def raise_if_pruned(self) -> None:
        """Raises `optuna.TrialPruned` where the trial was pruned, for Optuna to take note of; else does nothing.

        Raises:
            optuna.TrialPruned: the last fit was stopped by this callback.
            ImportError: and Optuna is not installed.
        """
        if self.pruned is None:
            return
        try:
            from optuna import TrialPruned  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(
                f"{self.pruned}; optuna.TrialPruned can't be raised, for Optuna is not installed: "
                "pip install 'trainkit[search]'."
            ) from error
        raise TrialPruned(self.pruned)

    def state_dict(self) -> dict[str, Any]:
        return {"reported": self._reported, "pruned": self.pruned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._reported = max(self._reported, state["reported"])
        self.pruned, self._resumed = state["pruned"], True

    def close(self) -> None:
        self._resumed = False

    def reset(self) -> None:
        self._reported, self.pruned, self._resumed = 0, None, False

    def _look(self, info: Info, hook: str) -> Action:
        value = self._monitor.value(info, hook)
        if value is None or not self._is_to_be_pruned(value, info.step):
            return None
        self.pruned = f"pruned: {self._monitor.name} is {value:.6g} at step {info.step}"
        return Stop(self.pruned)

    def _is_to_be_pruned(self, value: float, step: int) -> bool:
        prune = False
        if self._trial is not None:
            # Steps that are done anew after going back to a checkpoint were reported: a trial hears of a step once.
            if step > self._reported:
                self._trial.report(value, step)
            prune = bool(self._trial.should_prune())
        self._reported = max(step, self._reported)
        if jax.process_count() > 1:
            prune = bool(multihost_utils.broadcast_one_to_all(np.asarray(prune)))
        return prune
