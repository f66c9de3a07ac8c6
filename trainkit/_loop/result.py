"""`FitResult`: what came of a fit. Owns how it is summed up and printed; computes no metric."""

import dataclasses
from collections.abc import Callable, Mapping

from trainkit._core.history import History
from trainkit._core.state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What one scalar came to.

    Attributes:
        last: the newest value.
        best: the best value, of equal ones the first; None where no metric of that name is registered with a
            direction, or no value was a number.
        best_step: step of `best`.
    """

    last: float
    best: float | None = None
    best_step: int | None = None


def summarized(history: History, direction: Callable[[str], str | None]) -> dict[str, Summary]:
    """Returns what each scalar came to.

    Args:
        history: the scalars.
        direction: says "min" or "max", None where it is not known, by full name.
    """
    found = {}
    for name in history:
        better = direction(name)
        best = None if better is None else history.best(name, better)
        step, value = best or (None, None)
        found[name] = Summary(last=history.last(name), best=value, best_step=step)
    return found


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class FitResult:
    """What a fit returns. Printed, it shows the last and the best value of every metric, and where the time went.

    Attributes:
        state: the train state at the end.
        step: updates completed, over all fits of the trainer.
        epoch: passes over the training source begun, over all fits of the trainer.
        seconds: wall-clock time of this fit, initialisation and compilation included.
        stopped_by: why the fit ended before its `epochs=` or `steps=`, None when it did not.
        history: every scalar logged, over all fits of the trainer; `history["eval/loss"]` is a list of
            `(step, value)` pairs.
        metrics: `last`, `best` and `best_step` of every scalar in the history, by name.
        timing: seconds of this fit in "compile", "data" (waiting for batches), "step" (dispatching steps and waiting
            for them), "eval", "save", "callbacks" and "other", which add up to `seconds`.
    """

    state: TrainState
    step: int
    epoch: int
    seconds: float
    stopped_by: str | None
    history: History
    metrics: Mapping[str, Summary] = dataclasses.field(default_factory=dict)
    timing: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        first = (
            f"FitResult(step={self.step}, epoch={self.epoch}, seconds={self.seconds:.4g}, "
            f"stopped_by={self.stopped_by!r})"
        )
        width = max(map(len, self.metrics), default=0)
        lines = [f"  {name:<{width}}  {_said(self.metrics[name])}" for name in sorted(self.metrics)]
        spent = [f"{part} {seconds:.3g} s" for part, seconds in self.timing.items() if seconds >= 5e-4]
        return "\n".join([first, *lines, *([f"  time: {', '.join(spent)}"] if spent else [])])


def _said(summary: Summary) -> str:
    last = f"last {summary.last:<10.5g}"
    if summary.best is None:
        return last.rstrip()
    return f"{last} best {summary.best:.5g} (step {summary.best_step})"


def with_result(error: BaseException, result: FitResult) -> BaseException:
    """Returns `error` with what came of the fit as its `.result`."""
    vars(error)["result"] = result  # of KeyboardInterrupt itself: Python ends a program by no subclass of it
    return error
