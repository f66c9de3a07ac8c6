"""When the processes of a fit meet, to agree on the time and on signals: often enough to act on a signal in time.

Owns the steps and batches between two meetings, which are the same on every process; what is agreed there is of
`interrupts`.
"""

from collections.abc import Callable

import jax

from trainkit._core.cadence import NEVER
from trainkit._core.typing import PyTree
from trainkit._loop.interrupts import Interrupts

EVERY = 32
"""Steps, or batches of an evaluation, between two meetings at most. Each costs a round trip."""

# About as long as a process may take to hear what another was told. A pod or a spare machine has 30 s to end.
_SECONDS = 10.0


class Meetings:
    """The meetings of one fit; where there is one process only, there are none.

    Attributes:
        next_step: at which to meet at the latest, when the running call ends: so no call is divided otherwise for it.
        seconds: since the fit began, on the first process when they last met.

    Args:
        interrupts: what they agree on.
        clock: returns the seconds since the fit began, on this process.
        step: at which it begins.
        together: whether there are several processes.
    """

    def __init__(
        self, interrupts: Interrupts, clock: Callable[[], float], step: int, *, together: bool
    ) -> None:
        self._interrupts, self._clock = interrupts, clock
        self._step, self._apart = step, EVERY
        # The first call compiles; the one after it tells how long steps take.
        self.next_step = step + 1 if together else NEVER
        self.seconds = 0.0

    def meet(self, step: int, running: PyTree) -> None:
        """Meets after a step; `running` is what it returns.

        Programs that were dispatched are waited for: on a CPU their collectives and that of a meeting would be carried
        out in no order, and in another one on each process.
        """
        jax.block_until_ready(running)
        self._agree(step - self._step)
        self._step, self.next_step = step, step + self._apart

    def during_evaluation(self) -> Callable[[int, PyTree], None]:
        """Returns what to call before each batch of an evaluation, with the number done and what the last returns."""
        met, apart = 0, self._apart

        def look(batches: int, running: PyTree) -> None:
            nonlocal met, apart
            if batches - met >= apart:
                jax.block_until_ready(running)
                self._agree(batches - met)
                met, apart = batches, self._apart

        return look

    def _agree(self, done: int) -> None:
        before = self.seconds
        self.seconds = self._interrupts.agree(self._clock())
        # Of the first process, so that all have the same.
        took = max(self.seconds - before, 1e-9)
        self._apart = int(min(EVERY, max(1, done * _SECONDS / took)))
