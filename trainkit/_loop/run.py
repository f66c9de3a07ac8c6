"""Where a trainer stands in its run, over all of its fits. Owns what a checkpoint sets back; trains nothing."""

import os
from collections.abc import Sequence
from typing import Any

from trainkit._core.history import History
from trainkit._core.position import Position
from trainkit._core.state import TrainState
from trainkit._core.tree import named_leaves
from trainkit._engine.engine import Engine
from trainkit._resume.choose import choose, newest_of
from trainkit._resume.restore import Restored, restore_built, restore_partly, restore_state
from trainkit._resume.saved import Saved, load_saved
from trainkit.checkpoint._store import Store
from trainkit.writers._writer import MetricWriter


class Run:
    """The run of one trainer.

    Attributes:
        history: every scalar logged.
        position: where it stands in its data.
        fits: how many were begun.
        data: what the last of them trained on, None before the first.
    """

    def __init__(self) -> None:
        self.history, self.position, self.fits = History(), Position(), 0
        self.data: Any = None
        self._catching_up = True

    def aim_at(self, data: Any) -> None:
        """Notes what the next fit trains on: the same goes on inside its pass, other data begin one of their own."""
        if self.data is not None and data is not self.data:
            self.position.batch = self.position.rows = 0
        self.data = data

    def forget_data(self) -> None:
        """Takes whatever the next fit trains on for the data in which the run stands."""
        self.data, self.position.rows = None, 0

    def find(self, stores: Sequence[Store], writer: MetricWriter, step: int) -> tuple[Store, Saved] | None:
        """Returns where an earlier process left the run, None where there is nothing of it left to catch up with.

        Args:
            stores: its checkpoints; none where it is not to be resumed.
            writer: of the logs.
            step: updates completed here.
        """
        if not stores or not self._catching_up:
            return None
        for store in stores:
            store.clean()  # first of all: what a full disk broke off may take the room that the logs need
        newest = newest_of(stores)
        if newest is None:
            # Killed before its first checkpoint, a run leaves logs all the same.
            writer.rewind(step, ())
            return None
        store, saved = newest[0], load_saved(*newest)
        self.set_to(saved)
        return store, saved

    def begin(self, saved: Saved | None) -> None:
        """Notes that a fit begins, with what `find` found; called when nothing can be wrong with that any more."""
        self.fits += 1
        self._catching_up = saved is not None and saved.fit > self.fits

    def set_to(self, saved: Saved) -> None:
        """Stands where `saved` was."""
        self.position.epoch, self.position.batch, self.position.rows = saved.epoch, saved.batch, saved.rows
        self.history.load_state_dict(saved.history)


def restore(
    engine: Engine,
    run: Run,
    current: TrainState | None,
    path: str | os.PathLike[str],
    step: int | str,
    partial: bool | Sequence[str],
) -> tuple[TrainState, Restored]:
    """Returns the train state of a checkpoint and sets `run` to where it was; see `Trainer.restore`."""
    store, number = choose(path, step)
    if partial is not False:
        if current is None:
            raise RuntimeError("partial= fills in a state there is: call trainer.init(batch) first.")
        only = None if partial is True else (partial,) if isinstance(partial, str) else tuple(partial)
        return restore_partly(engine, store, number, current, only)
    if current is None:
        state = restore_built(engine, store, number)
    else:
        state = restore_state(engine, store, number, current)
    run.set_to(load_saved(store, number))
    run.forget_data()
    names = tuple(name for name, _ in named_leaves(state))
    return state, Restored(str(store.folder / str(number)), number, names)
