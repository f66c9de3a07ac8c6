"""`EarlyStopping`: ends a fit when a metric no longer improves. The rule of improvement is `Monitor`'s."""

import math
from typing import Any, ClassVar, Literal

import jax

from trainkit._core.tree import copy_arrays, named_leaves, path_name
from trainkit.callbacks._callback import Action, Callback, Phase, Stop, Update
from trainkit.callbacks._info import Info
from trainkit.callbacks._monitor import EPOCH, EVALUATION, Monitor, check_count


class EarlyStopping(Callback):
    """Stops the fit at the `patience`-th evaluation in a row that brought no improvement.

    A value improves iff `value < best - min_delta` (mode "min"; mirrored for "max"). Metrics of an
    evaluation are counted in evaluations, wherever in an epoch they fall; `train/...` metrics in epochs.

    Best value, its step and the count survive a resume. A further fit of the same run goes on with them, except that
    the count starts again at 0 after a stop; with another run (another trainer, or a state that was set, restored or
    reset) the callback begins afresh.

    After `restore_best` the run stands at the best step: `result.step`, the state and the newest checkpoint are those
    of that step. Logs and history keep the steps after it until a further fit takes them back. A signal restores
    nothing: its run is to go on.

    Args:
        monitor: full name of a metric, e.g. `eval/loss`.
        mode: "min" or "max"; None where the metric is registered with a direction.
        patience: int >= 1.
        min_delta: float >= 0, by how much a value must be better than the best.
        check_finite: stop at once when the value is not finite. A value that is not never becomes the best.
        restore_best: end the fit, stopped early or not, with the whole state of the best step. Keeps a
            second copy of the state on the devices, and in each checkpoint.

    Raises:
        ValueError: an argument is out of range; at the start of a fit, when the name can't appear in it or
            its direction is not known; at the first evaluation, when it did not appear.

    Example:
        >>> stopping = EarlyStopping("eval/loss", mode="min", patience=5)
    """

    phase: ClassVar[Phase] = Phase.MONITOR

    def __init__(
        self,
        monitor: str,
        *,
        mode: Literal["min", "max"] | None = None,
        patience: int = 10,
        min_delta: float = 0.0,
        check_finite: bool = True,
        restore_best: bool = False,
    ) -> None:
        self._monitor = Monitor("EarlyStopping", monitor, mode=mode, min_delta=min_delta)
        why = "with less the fit would stop at its first evaluation, whatever that brought"
        check_count("EarlyStopping", "patience", patience, least=1, why=why)
        self._patience, self._check_finite, self._restore_best = patience, check_finite, restore_best
        self._count = 0
        self._stopped = False
        self._best_state: dict[str, Any] | None = None  # arrays by path name

    def on_fit_start(self, info: Info) -> Action:
        self._monitor.start(info)
        at_best = self._best_state is not None and info.step == self._monitor.best_step
        if self._stopped or at_best:
            self._count, self._stopped = 0, False
        # Only a checkpoint of the very step of a stop brings such a count: its fit was over.
        return self._stop() if self._count >= self._patience else None

    def on_eval_end(self, info: Info) -> Action:
        return self._look(info, EVALUATION)

    def on_epoch_end(self, info: Info) -> Action:
        return self._look(info, EPOCH)

    def on_fit_end(self, info: Info) -> Action:
        best = self._best_state
        if best is None:
            return None
        return Update(
            lambda state: jax.tree_util.tree_map_with_path(lambda path, leaf: best[path_name(path)], state)
        )

    def state_dict(self) -> dict[str, Any]:
        best = {} if self._best_state is None else {"best_state": self._best_state}
        return {**self._monitor.state_dict(), "count": self._count, **best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._monitor.load_state_dict(state)
        self._count, self._stopped, self._best_state = state["count"], False, state.get("best_state")

    def reset(self) -> None:
        self._monitor.reset()
        self._count, self._stopped, self._best_state = 0, False, None

    def _look(self, info: Info, hook: str) -> Action:
        value = self._monitor.value(info, hook)
        if value is None:
            return None
        if self._check_finite and not math.isfinite(value):
            self._stopped = True
            return Stop(f"early stopping: {self._monitor.name} is {value} at step {info.step}")
        if not self._monitor.improved(value, info.step):
            self._count += 1
            return self._stop() if self._count >= self._patience else None
        self._count = 0
        if self._restore_best:
            self._best_state = None  # freed before the new copy is made
            self._best_state = dict(named_leaves(copy_arrays(info.state)))
        return None

    def _stop(self) -> Stop:
        self._stopped = True
        return Stop(f"early stopping: {self._monitor.since_best(self._count)}")
