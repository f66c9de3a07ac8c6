"""The state as `weights=` asks for it, with batch statistics estimated anew where its view wants them.

Owns that order; neither the views nor the pass.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

from trainkit._core.state import TrainState
from trainkit._core.tree import copy_arrays
from trainkit._core.typing import PyTree
from trainkit._engine.engine import Engine
from trainkit._engine.views import AVERAGED
from trainkit._loop.standing import Standing
from trainkit._loop.statistics import pooled_statistics
from trainkit.data._source import as_source
from trainkit.hooks._view import View


def weighted(engine: Engine, state: TrainState, weights: str) -> TrainState:
    """Returns `state` with the weights of that name in place.

    Raises:
        ValueError: there are none of that name.
    """
    view = engine.views.chosen(weights)
    if view is None:
        return state
    new = _refreshed(engine, state, view, _never)
    assert new is not None  # nothing interrupts it here
    return engine.views.read(view, new)


class Weights:
    """The weights that one fit evaluates with.

    Args:
        engine: of the trainer.
        standing: where the fit stands; its state remembers the statistics.
        breaking_off: begins a pass: what it returns says whether a signal ends it, given the batches done.
        timed: counts what happens within for a part of the fit.
    """

    def __init__(
        self,
        engine: Engine,
        standing: Standing,
        breaking_off: Callable[[], Callable[[int, PyTree], bool]],
        timed: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self._engine, self._standing, self._breaking_off, self._timed = engine, standing, breaking_off, timed

    def evaluated(self) -> TrainState | None:
        """Returns the state with the averaged weights in place, None where a signal came in between."""
        view = self._engine.views.chosen(AVERAGED)
        if view is None:
            return self._standing.state
        return self._engine.views.read(view, self._standing.state) if self._remember(view) else None

    def settle(self) -> None:
        """Has the state remember the statistics of every view, unless a signal comes: the fit goes on later then."""
        for view in self._engine.views.all:
            if view.refresh is not None and not self._breaking_off()(0, None):
                with self._timed("eval"):
                    self._remember(view)

    def _remember(self, view: View) -> bool:
        state = _refreshed(self._engine, self._standing.state, view, self._breaking_off())
        if state is not None:
            self._standing.state = state
        return state is not None


def _refreshed(
    engine: Engine, state: TrainState, view: View, interrupted: Callable[[int, PyTree], bool]
) -> TrainState | None:
    """Returns `state` with the batch statistics that a view wants; None where `interrupted` said so."""
    if view.refresh is None or not view.refresh.wanted(state):
        return state
    source = as_source(view.refresh.data, units=engine.steps.units)
    statistics = pooled_statistics(engine, engine.views.read(view, state), source, interrupted)
    if statistics is None:
        return None
    # In buffers of their own, for the next step takes those of its state.
    placed = copy_arrays(engine.strategy.replicate(statistics))
    return engine.strategy.lay_out(view.refresh.keep(state, placed))


def _never(batches: int, running: PyTree) -> bool:
    return False
