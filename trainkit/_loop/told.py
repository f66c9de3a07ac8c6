"""What the callbacks of a fit are told, and what becomes of what they ask for.

Owns the meaning of a request; not the order of hooks, nor saving and going back.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from trainkit._engine.engine import Engine
from trainkit._loop.costs import Costs
from trainkit._loop.questions import Questions
from trainkit._loop.record import Record
from trainkit._loop.request import Request
from trainkit._loop.standing import Standing
from trainkit._loop.stopwatch import Stopwatch
from trainkit._loop.train_metrics import NO_METRICS, TrainMetrics
from trainkit.callbacks._callback import Callback, Rollback, Save, Stop, Update
from trainkit.callbacks._checkpoint import Checkpoint
from trainkit.callbacks._info import Info
from trainkit.metrics._accumulator import Accumulator


class Told:
    """Makes the information for each hook, and carries out what it returned.

    Attributes:
        evaluation: metrics of the evaluation that is told.
        epoch: metrics of the pass whose end is told.
        direction: says which way a metric improves, by its full name.
        going_back: what becomes of an update to the state of an earlier step: "refused", "allowed" at the end of the
            fit, "ignored" where a signal ended it, for then the run goes on later.

    Args:
        engine: of the trainer.
        request: what the fit was asked.
        standing: where it stands.
        metrics: of its steps.
        accumulator: of these.
        record: its logs.
        seconds: returns the seconds since it began.
        watch: where its time goes.
        costs: what it has cost so far.
        probed: returns what the probe of a callback gave for the step that is told.
    """

    def __init__(
        self,
        engine: Engine,
        request: Request,
        standing: Standing,
        metrics: TrainMetrics,
        accumulator: Accumulator,
        record: Record,
        seconds: Callable[[], float],
        watch: Stopwatch,
        costs: Costs,
        probed: Callable[[Callback], Any],
    ) -> None:
        self._engine, self._request, self._standing = engine, request, standing
        self._metrics, self._record, self._seconds = metrics, record, seconds
        self._costs, self._probed = costs, probed
        self._asked = Questions(engine, lambda: standing.state, watch.on)
        self._history = record.history.shown()
        self.direction = functools.partial(direction_of, accumulator)
        self._keepers = [one for one in request.callbacks if isinstance(one, Checkpoint)]
        self.evaluation: Mapping[str, Any] = NO_METRICS
        self.epoch: Mapping[str, Any] = NO_METRICS
        self.going_back: Literal["refused", "allowed", "ignored"] = "refused"

    def info(self, callback: Callback, hook: str) -> Info:
        """Returns what `hook` of `callback` is told."""
        standing = self._standing
        return Info(
            step=standing.step,
            epoch=standing.position.epoch,
            state=lambda: standing.state,
            metrics=functools.partial(self._metrics_for, callback, hook),
            history=self._history,
            logdir=self._request.logdir,
            writer=self._record.writer(callback),
            plan=standing.plan,
            seconds=self._seconds(),
            direction=self.direction,
            asked=self._asked,
            costs=self._costs,
            probed=self._probed(callback) if hook == "on_step" else None,
        )

    def act(self, callback: Callback, action: Stop | Update | Save | Rollback) -> None:
        """Carries out what a hook of `callback` returned, or notes it for the end of the step."""
        standing = self._standing
        if isinstance(action, Save):
            keepers = [callback] if isinstance(callback, Checkpoint) else self._keepers
            if not keepers:
                raise RuntimeError(
                    f"{type(callback).__name__} returned Save, and nothing saves: add tk.callbacks.Checkpoint()."
                )
            standing.wanted |= {id(keeper) for keeper in keepers}
        elif isinstance(action, Rollback):
            standing.rollback = standing.rollback or (callback, action.reason)
        elif isinstance(action, Stop):
            standing.stopped_by = standing.stopped_by or action.reason
        else:
            self._update(callback, action)

    def _update(self, callback: Callback, update: Update) -> None:
        standing, name = self._standing, type(callback).__name__
        old = standing.state
        new, moved = self._engine.updated(old, update.fn, by=name)
        if moved:
            if self.going_back == "ignored":
                return
            if self.going_back == "refused" or np.any(np.asarray(new.step) > np.asarray(old.step)):
                raise ValueError(
                    f"{name} returned an Update that changes state.step from {old.step} to {new.step}: steps are "
                    "counted by the fit, and logs and checkpoints go by them. Keep it, state.replace(step=old.step); "
                    "to go back to the newest checkpoint return tk.Rollback(reason)."
                )
            standing.came_to, standing.step = standing.step, int(np.max(np.asarray(new.step)))
        standing.state = new

    def _metrics_for(self, callback: Callback, hook: str) -> Mapping[str, Any]:
        if hook in ("on_step", "on_fit_end", "on_exception"):
            self._metrics.cut()
            return self._record.reader(callback).take()
        return self.evaluation if hook == "on_eval_end" else self.epoch


def direction_of(accumulator: Accumulator, name: str) -> str | None:
    """Returns "min" or "max" for a full metric name such as `eval/accuracy`, None where nothing is registered."""
    return accumulator.direction(name.rsplit("/", 1)[-1])
