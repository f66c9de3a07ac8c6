"""When each of several things is due next. Owns no order among them; the loop calls what is due."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from trainkit._core.cadence import NEVER, Cadence


@dataclasses.dataclass(frozen=True)
class Chore:
    """Something the loop itself does at a cadence."""

    every: Cadence
    run: Callable[[], Any]


class Timetable:
    """When each of several things with a cadence `every` is due next."""

    def __init__(self, things: list[Any], step: int) -> None:
        self._things = things
        self._steps = [thing.every.next_step(step) for thing in things]
        self._times = [thing.every.seconds or math.inf for thing in things]

    @property
    def things(self) -> list[Any]:
        """Returns all of them, whether due or not."""
        return list(self._things)

    @property
    def next_step(self) -> float:
        """The next step at which something is due by steps."""
        return min(self._steps, default=NEVER)

    @property
    def next_time(self) -> float:
        """The next time, in seconds into the fit, at which something is due."""
        return min(self._times, default=NEVER)

    def take_due(self, step: int, epoch: int | None, now: float) -> list[Any]:
        """Returns what is due after `step`, which completed `epoch` (None: none), `now` seconds into the fit."""
        due = []
        for index, thing in enumerate(self._things):
            every = thing.every
            by_step, by_time = step >= self._steps[index], now >= self._times[index]
            if by_step:
                self._steps[index] = every.next_step(step)
            if by_time:
                self._times[index] = now + (every.seconds or math.inf)
            if by_step or by_time or (epoch is not None and every.due_epoch(epoch)):
                due.append(thing)
        return due
