"""`StopAfter`: ends a fit after so much of it. Owns what is counted; looks at no metric, which `StopWhen` does."""

import math
from typing import Any, ClassVar

from trainkit._core.cadence import At, Cadence, Every
from trainkit.callbacks._callback import Action, Callback, Phase, Stop
from trainkit.callbacks._info import Info

_SOON = 1e-6


class StopAfter(Callback):
    """Stops the fit after so many steps, passes over the data or seconds; exactly one of the three is given.

    Steps and passes are those of the run, over all of its fits: a further fit of a run that has them already ends at
    once. Seconds are those of one fit by the wall clock, over all resumes of it, compilation and evaluations included;
    what a killed process did after its last checkpoint is not known and not counted. The running call of steps is
    finished first, and what is due where the fit ends, an evaluation and a checkpoint among it, is done.

    Args:
        steps: int >= 1, updates of the run.
        epochs: int >= 1, complete passes of the run over its data.
        seconds: float > 0, of this fit.

    Raises:
        ValueError: none or several are given, or one is out of range.

    Example:
        >>> callbacks = [StopAfter(seconds=3600)]
    """

    phase: ClassVar[Phase] = Phase.MONITOR

    def __init__(
        self, *, steps: int | None = None, epochs: int | None = None, seconds: float | None = None
    ) -> None:
        _check(steps=steps, epochs=epochs, seconds=seconds)
        self._steps, self._epochs, self._limit = steps, epochs, seconds
        self._before = self._spent = 0.0
        self._runs = self._resumed = False
        self.every = self._cadence()

    def on_fit_start(self, info: Info) -> Action:
        if not self._resumed:
            self._before = 0.0
        self._runs, self._resumed = True, False
        return self._look(info)

    def on_epoch_start(self, info: Info) -> Action:
        # Reached where the passes were done before this fit: that a pass is begun tells that those before it are done.
        if self._epochs is not None and info.epoch > self._epochs:
            return Stop(f"stop after {self._epochs} epochs: done before step {info.step}")
        return None

    def on_step(self, info: Info) -> Action:
        if self._epochs is None:
            return self._look(info)
        # Due at the end of every pass; a dry run looks inside one, and may be stopped there.
        done = info.epoch >= self._epochs and not info.plan.dry_run
        return Stop(f"stop after {self._epochs} epochs: done at step {info.step}") if done else None

    def on_save(self, info: Info) -> None:
        self._spent = self._before + info.seconds

    def close(self) -> None:
        self._runs, self.every = False, self._cadence()

    def state_dict(self) -> dict[str, Any]:
        return {} if self._limit is None else {"seconds": self._spent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # Going back to a checkpoint within a fit gives no time back.
        if self._limit is not None and not self._runs:
            self._before = self._spent = state["seconds"]
            self._resumed = True
            self.every = self._cadence()

    def reset(self) -> None:
        self._before, self._spent, self._resumed = 0.0, 0.0, False
        self.every = self._cadence()

    def _cadence(self) -> Cadence:
        if self._steps is not None:
            return At(steps=(self._steps,))
        if self._epochs is not None:
            return Every(epochs=1)
        assert self._limit is not None
        left = self._limit - (self._before if self._resumed else 0.0)
        return Every(seconds=max(left, _SOON))

    def _look(self, info: Info) -> Action:
        if self._steps is not None and info.step >= self._steps:
            return Stop(f"stop after {self._steps} steps: at step {info.step}")
        if self._limit is not None and self._before + info.seconds >= self._limit:
            spent = self._before + info.seconds
            return Stop(f"stop after {self._limit:g} seconds: {spent:.4g} s at step {info.step}")
        return None


def _check(**given: Any) -> None:
    present = {name: value for name, value in given.items() if value is not None}
    if len(present) != 1:
        raise ValueError(
            f"StopAfter takes exactly one of steps=, epochs= and seconds=; got {present or 'none'}. Give one, e.g. "
            "StopAfter(steps=1000), and several callbacks for several limits."
        )
    ((name, value),) = present.items()
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
    if not number or (name != "seconds" and not isinstance(value, int)):
        kind = "finite number" if name == "seconds" else "int"
        raise ValueError(f"StopAfter({name}={value!r}): must be a positive {kind}.")
