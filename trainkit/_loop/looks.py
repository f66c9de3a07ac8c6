"""The evaluations of one fit: of all its sources, by the weights that are evaluated, until a signal breaks them off.

Owns what an evaluation looks at; not when it is due, nor who is told.
"""

from collections.abc import Callable
from typing import Any

import jax

from trainkit._core.typing import PyTree
from trainkit._engine.engine import Engine
from trainkit._loop.evaluate import evaluate
from trainkit._loop.interrupts import Interrupts
from trainkit._loop.meetings import Meetings
from trainkit._loop.request import Request
from trainkit._loop.standing import Standing
from trainkit._loop.stopwatch import Stopwatch
from trainkit._loop.weights import Weights


class Looks:
    """Looks at the state of a fit through its evaluation sources.

    Attributes:
        weights: that are evaluated.

    Args:
        engine: of the trainer.
        request: what the fit was asked.
        standing: where it stands.
        meetings: of its processes.
        interrupts: what it was asked meanwhile.
        watch: where its time goes.
        together: whether there are several processes.
    """

    def __init__(
        self,
        engine: Engine,
        request: Request,
        standing: Standing,
        meetings: Meetings,
        interrupts: Interrupts,
        watch: Stopwatch,
        *,
        together: bool,
    ) -> None:
        self._engine, self._request, self._watch = engine, request, watch
        self._meetings, self._interrupts, self._together = meetings, interrupts, together
        self.weights = Weights(engine, standing, self._breaking_off, watch.on)

    def metrics(self) -> dict[str, Any] | None:
        """Returns the metrics of every evaluation source, None where a signal came in between."""
        state, metrics = self.weights.evaluated(), dict[str, Any]()
        if state is None:
            return None
        for name, source in self._request.evaluations.items():
            values = evaluate(
                self._engine, state, source, self._breaking_off(), lambda tree: wait_for(self._watch, tree)
            )
            if values is None:
                return None
            metrics |= {f"{name}/{metric}": value for metric, value in values.items()}
        return metrics

    def _breaking_off(self) -> Callable[[int, PyTree], bool]:
        """Returns what says whether a signal breaks an evaluation off; processes meet there.

        It is given the batches done, and what the last call of a program returns.
        """
        look = self._meetings.during_evaluation() if self._together else None

        def asked(batches: int, running: PyTree) -> bool:
            if look is not None:
                look(batches, running)
            return self._interrupts.received is not None

        return asked


def wait_for(watch: Stopwatch, tree: PyTree) -> None:
    """Waits for arrays of the training steps, where something is to wait for them anyway."""
    with watch.on("step"):
        jax.block_until_ready(tree)
