"""Which steps of a fit run with probes, and what those found. Owns no program and no cadence."""

from collections.abc import Sequence
from typing import Any

from trainkit._core.cadence import NEVER
from trainkit._engine.prepared import Prepared
from trainkit._feed.feed import Fed
from trainkit._loop.standing import Standing
from trainkit._loop.train_metrics import TrainMetrics
from trainkit.callbacks._callback import Callback


class Probing:
    """The probes of the callbacks of one fit.

    A cadence in steps says beforehand which step is probed, and so does one in passes whose length is known. Where
    it is not, and for a cadence in seconds, that is the step after the one at which it was due.

    Args:
        callbacks: that are called after steps, in their order.
        standing: where the fit stands.
        accumulate: batches of a step.
    """

    def __init__(self, callbacks: Sequence[Callback], standing: Standing, accumulate: int) -> None:
        self._callbacks, self._standing, plan = callbacks, standing, standing.plan
        position = standing.position
        self._names = {id(one): probe.name for one in callbacks if (probe := one.step_probe()) is not None}
        self._probing = [one for one in callbacks if id(one) in self._names]
        self._per_pass, self._accumulate = plan.steps_per_epoch, accumulate
        self._end_of_pass = NEVER
        # Of a dry run everything is tried at its last step.
        self._last = plan.steps if plan.dry_run and plan.steps is not None else NEVER
        self._found: dict[str, Any] | None = None
        self._told: dict[str, Any] = {}
        step = standing.step
        # Between two passes: what was due at the end of the last was not told, unless another was due by steps there.
        open_ = position.epoch > 0 and not position.batch and self._per_pass is None
        open_ = open_ and all(one.every.next_step(step - 1) > step for one in self._probing)
        self._late = {id(one) for one in self._probing if open_ and one.every.due_epoch(position.epoch)}

    def begin_pass(self) -> None:
        """Notes that the steps of a pass, or of what is left of it, follow."""
        position, self._end_of_pass = self._standing.position, NEVER
        if self._per_pass is not None and any(one.every.due_epoch(position.epoch) for one in self._probing):
            self._end_of_pass = self._standing.step + self._per_pass - position.batch // self._accumulate

    @property
    def next_step(self) -> float:
        """The next step that runs with probes."""
        if not self._probing:
            return NEVER
        step = self._standing.step
        if self._late:
            return step + 1
        ends = [end for end in (self._end_of_pass, self._last) if end > step]
        return min(*(one.every.next_step(step) for one in self._probing), *ends, NEVER)

    def run(self, prepared: Prepared, metrics: TrainMetrics, fed: Fed) -> None:
        """Runs one step with probes."""
        assert prepared.probed is not None
        calls, standing = prepared.calls, self._standing
        raw, packed, self._found = calls.probed(prepared.probed, standing.raw, metrics.packed, fed)
        standing.raw, metrics.packed = raw, packed

    def told(self, due: list[Callback]) -> list[Callback]:
        """Returns which callbacks are called after this step, of those due: with a probe, only where it was probed."""
        if not self._probing:
            return due
        if self._found is None:
            self._told = {}
            self._late |= {id(one) for one in due if id(one) in self._names}
            return [one for one in due if id(one) not in self._names]
        self._told, self._found = self._found, None
        late, self._late = self._late, set()
        wanted = {id(one) for one in due} | late
        return [one for one in self._callbacks if id(one) in wanted]

    def values_for(self, callback: Callback) -> Any:
        """Returns what the probe of a callback gave for the step that is told, None without one."""
        return self._told.get(self._names.get(id(callback), ""))
