"""`StopWhen`: ends a fit when a metric crosses a limit. How a metric is found by its name is `Monitor`'s."""

import math
from typing import Any, ClassVar

from trainkit.callbacks._callback import Action, Callback, Phase, Stop
from trainkit.callbacks._info import Info
from trainkit.callbacks._monitor import EPOCH, EVALUATION, Monitor


class StopWhen(Callback):
    """Stops the fit when a metric is strictly below or strictly above a limit; exactly one of the two is given.

    Metrics of an evaluation are looked at in each evaluation, wherever in a pass it falls; `train/...` metrics, over
    the pass, at its end. A value that is not a number (NaN) is neither below nor above anything.

    Args:
        name: full name of a metric, e.g. `eval/loss`.
        below: finite number; the fit stops at a value `< below`.
        above: finite number; the fit stops at a value `> above`.

    Raises:
        TypeError: `name` is not a str.
        ValueError: none or both of the limits are given, or one is not a finite number; at the start of a fit, when the
            name can't appear in it; at the first evaluation, when it did not appear, with the names there are.

    Example:
        >>> callbacks = [StopWhen("eval/accuracy", above=0.99)]
    """

    phase: ClassVar[Phase] = Phase.MONITOR

    def __init__(self, name: str, *, below: float | None = None, above: float | None = None) -> None:
        if not isinstance(name, str):
            raise TypeError(f"StopWhen({name!r}): expected the full name of a metric, e.g. 'eval/loss'.")
        given = {key: value for key, value in (("below", below), ("above", above)) if value is not None}
        if len(given) != 1:
            raise ValueError(
                f"StopWhen({name!r}) takes exactly one of below= and above=; got {given or 'none'}. Give one, and two "
                "callbacks for two limits."
            )
        ((self._side, limit),) = given.items()
        self._limit = _as_number(self._side, limit)
        self._monitor = Monitor("StopWhen", name, mode="min" if below is not None else "max", min_delta=0.0)

    def on_fit_start(self, info: Info) -> None:
        self._monitor.start(info)
        self.reads_epoch = self._monitor.unit == "epochs"

    def on_eval_end(self, info: Info) -> Action:
        return self._look(info, EVALUATION)

    def on_epoch_end(self, info: Info) -> Action:
        return self._look(info, EPOCH)

    def _look(self, info: Info, hook: str) -> Action:
        value = self._monitor.value(info, hook)
        if value is None:
            return None
        crossed = value < self._limit if self._side == "below" else value > self._limit
        if not crossed:
            return None
        name, limit = self._monitor.name, f"{self._limit:.6g}"
        return Stop(f"stop when {name} is {self._side} {limit}: it is {value:.6g} at step {info.step}")


def _as_number(side: str, limit: Any) -> float:
    try:
        number = math.nan if isinstance(limit, bool | str) else float(limit)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"StopWhen({side}={limit!r}): must be a finite number.")
    return number
