"""Which steps of a fit run with probes, as calls of their own, and what those found. Owns no program and no cadence."""

from collections.abc import Sequence
from typing import Any

from trainkit._calls.calls import Calls
from trainkit._core.cadence import NEVER
from trainkit._engine.prepared import Prepared
from trainkit._feed.feed import Fed
from trainkit._loop.standing import Standing
from trainkit.callbacks._callback import Callback


class ProbedCalls:
    """As `Calls`, but that a step with probes is a call of its own, by another program.

    Args:
        prepared: the step, and the one with probes.
        probing: says which are.
    """

    def __init__(self, prepared: Prepared, probing: "Probing") -> None:
        assert prepared.probed is not None
        self._calls, self._probed, self._probing = prepared.calls, prepared.probed, probing
        self.takes, self.pause, self.resume = self._calls.takes, self._calls.pause, self._calls.resume
        self._is_probed = False

    def room(self, left: float) -> int:
        """As `Calls.room`, asked before each call; none reaches over a step with probes."""
        before = self._probing.steps_before
        self._is_probed = before < 1
        return 1 if self._is_probed else self._calls.room(min(left, before))

    def __call__(self, raw: Any, packed: Any, feds: Sequence[Fed]) -> tuple[Any, Any]:
        """As `Calls`."""
        if not self._is_probed:
            return self._calls(raw, packed, feds)
        raw, packed, values = self._calls.probed(self._probed, raw, packed, feds[0])
        self._probing.found(values)
        return raw, packed


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
        self._callbacks, self._standing, self._accumulate = callbacks, standing, accumulate
        self._names = {id(one): probe.name for one in callbacks if (probe := one.step_probe()) is not None}
        self._probing = [one for one in callbacks if id(one) in self._names]
        self._found: dict[str, Any] | None = None
        self._told: dict[str, Any] = {}
        step, position = standing.step, standing.position
        # Between two passes: what was due at the end of the last was not told, unless another was due by steps there.
        open_ = position.epoch > 0 and not position.batch and standing.plan.steps_per_epoch is None
        open_ = open_ and all(one.every.next_step(step - 1) > step for one in self._probing)
        self._late = {id(one) for one in self._probing if open_ and one.every.due_epoch(position.epoch)}
        # The step at which the next one with probes was worked out, and that one.
        self._known: tuple[float, float] = (NEVER, NEVER) if self._probing else (0, NEVER)

    def calls(self, prepared: Prepared) -> Calls | ProbedCalls:
        """Begins a pass, or what is left of it, and returns the calls in which its steps are dispatched."""
        if not self._probing:
            return prepared.calls
        self._known = (NEVER, NEVER)
        return ProbedCalls(prepared, self)

    @property
    def next_step(self) -> float:
        """The next step that runs with probes."""
        return self.steps_before + self._standing.step + 1

    @property
    def steps_before(self) -> float:
        """How many steps come before the next one with probes."""
        (since, known), step = self._known, self._standing.step
        if not since <= step < known:
            known = self._next_after(step)
            self._known = step, known
        return known - step - 1

    def found(self, values: dict[str, Any]) -> None:
        """Takes what the probes of the step just done gave."""
        self._found = values

    def told(self, due: list[Callback]) -> list[Callback]:
        """Returns which callbacks are called after this step, of those due: with a probe, only where it was probed."""
        if not self._probing:
            return due
        if self._found is None:
            self._told, self._known = {}, (NEVER, NEVER)
            self._late |= {id(one) for one in due if id(one) in self._names}
            return [one for one in due if id(one) not in self._names]
        self._told, self._found, self._known = self._found, None, (NEVER, NEVER)
        late, self._late = self._late, set()
        wanted = {id(one) for one in due} | late
        return [one for one in self._callbacks if id(one) in wanted]

    def values_for(self, callback: Callback) -> Any:
        """Returns what the probe of a callback gave for the step that is told, None without one."""
        return self._told.get(self._names.get(id(callback), ""))

    def _next_after(self, step: int) -> float:
        if self._late:
            return step + 1
        plan, position = self._standing.plan, self._standing.position
        steps = [one.every.next_step(step) for one in self._probing]
        if plan.steps_per_epoch is not None and any(
            one.every.due_epoch(position.epoch) for one in self._probing
        ):
            steps.append(step + plan.steps_per_epoch - position.batch // self._accumulate)
        if plan.dry_run and plan.steps is not None:
            steps.append(plan.steps)  # everything is tried at its last step
        return min([one for one in steps if one > step], default=NEVER)
