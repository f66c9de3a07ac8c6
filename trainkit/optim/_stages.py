"""`Stages`: from which step on each group of parameters is trained. Owns the steps; no optimizer."""

import dataclasses
from collections.abc import Mapping

from trainkit._core.cadence import NEVER, Cadence
from trainkit._core.patterns import Patterns


@dataclasses.dataclass
class Stages:
    """When groups of parameters are released.

    Attributes:
        patterns: of the groups, in their order.
        cadences: of each: a group is released where its own is due for the first time.
        released: the steps at which groups were released that wait for the end of a pass, by pattern.
    """

    patterns: Patterns
    cadences: Mapping[str, Cadence]
    released: dict[str, int] = dataclasses.field(default_factory=dict)

    def step_of(self, pattern: str) -> float:
        """Returns the number of updates after which a group is trained; infinite where that is not known or never."""
        return self.released.get(pattern, self.cadences[pattern].next_step(0))

    def held_back(self, step: int) -> frozenset[str]:
        """Returns the groups that are not trained by the update after `step`."""
        return frozenset(pattern for pattern in self.cadences if self.step_of(pattern) > step)

    def end_pass(self, epoch: int, step: int) -> None:
        """Notes that `epoch` passes were completed by `step`."""
        for pattern, cadence in self.cadences.items():
            if self.step_of(pattern) == NEVER and any(map(cadence.due_epoch, range(1, epoch + 1))):
                self.released[pattern] = step
