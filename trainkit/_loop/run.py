"""Where a trainer stands in its run, over all of its fits. Owns what a checkpoint sets back; trains nothing."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainkit._core.history import History
from trainkit._core.position import Position
from trainkit._core.state import TrainState
from trainkit._core.tree import named_leaves
from trainkit._engine.engine import Engine
from trainkit._feed.stream import Stream
from trainkit._resume.choose import choose, newest_of
from trainkit._resume.restore import Restored, restore_built, restore_partly, restore_state
from trainkit._resume.saved import Saved, load_saved
from trainkit.checkpoint._store import Store
from trainkit.data._base import Source
from trainkit.writers._writer import MetricWriter


class Run:
    """The run of one trainer.

    Attributes:
        history: every scalar logged.
        position: where it stands in its data.
        fits: how many were begun.
        data: what the last of them trained on, None before the first.
        place: where the source stood in the process that the run is taken up from, None where nothing is known.
    """

    def __init__(self) -> None:
        self.history, self.position, self.fits = History(), Position(), 0
        self.data: Any = None
        self.place: Mapping[str, Any] | None = None
        self._catching_up = True
        self._facts: Mapping[str, Any] = {}
        self._open: dict[int, tuple[Any, Source, Stream | None]] = {}

    def aim_at(self, data: Any, source: Source) -> Source:
        """Notes what the next fit trains on: the same goes on inside its pass, other data begin one of their own.

        Args:
            data: as the user gave them.
            source: made of them.

        Returns:
            The source to train on: that of before, where it is open.
        """
        if self.data is not None and data is not self.data:
            self.position.batch = self.position.rows = 0
            self.place, self._facts = None, {}
            # What can be passed over once is gone on with whenever it comes again; others begin a pass anew.
            self._open = {key: one for key, one in self._open.items() if isinstance(one[0], Iterator)}
        self.data = data
        _, source, stream = self._open.get(id(data), (data, source, None))
        if stream is not None:
            stream.count_from(self.position.batch)
        return source

    def open(self, engine: Engine, source: Source) -> Iterator[Any]:
        """Returns the batches from where the run stands: those left unread by the last fit, or a pass opened there.

        Raises:
            ValueError: inside a pass, the data are others than those of the checkpoint.
        """
        kept = self._open.get(id(self.data))
        if kept is not None and kept[2] is not None:
            return kept[2]
        position = self.position
        if position.batch:
            _check_facts(self._facts, source.facts())
        epoch = position.epoch - 1 if position.batch else position.epoch
        batches = engine.open(source, epoch, position.batch, self.place)
        self.place = None
        if isinstance(batches, Stream):
            self._open[id(self.data)] = self.data, source, batches
        return batches

    def put_down(self, stream: Stream | None) -> None:
        """Keeps what a fit left unread of its data for the next; None where that opens them anew."""
        self._facts = {}
        kept = self._open.pop(id(self.data), None)
        if kept is None or (stream is None and not isinstance(self.data, Iterator)):
            return
        # What can be passed over once is never opened anew: its next batch is what there is to go on with.
        left = stream if stream is not None or kept[2] is None or kept[2].ended else kept[2]
        self._open[id(self.data)] = *kept[:2], left

    def forget_data(self) -> None:
        """Takes whatever the next fit trains on for the data in which the run stands."""
        self.data, self.position.rows = None, 0
        self._open.clear()

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
        if saved.fit > self.fits + 1:
            self.place, self._facts = None, {}  # of the data of a later fit
        return store, saved

    def begin(self, saved: Saved | None) -> None:
        """Notes that a fit begins, with what `find` found; called when nothing can be wrong with that any more."""
        self.fits += 1
        self._catching_up = saved is not None and saved.fit > self.fits

    def set_to(self, saved: Saved) -> None:
        """Stands where `saved` was."""
        self.position.epoch, self.position.batch, self.position.rows = saved.epoch, saved.batch, saved.rows
        self.history.load_state_dict(saved.history)
        self.place, self._facts = saved.place, saved.data
        self._open.clear()


def _check_facts(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses data of which something known is otherwise than when the checkpoint was saved inside a pass."""
    changed = [
        f"{name} {then[name]!r} -> {value!r}"
        for name, value in now.items()
        if None not in (value, then.get(name)) and value != then[name]
    ]
    if changed:
        raise ValueError(
            f"the checkpoint was saved inside a pass over other data (saved -> now): {', '.join(changed)}. Its place "
            "would be another row: rows would be skipped or repeated. Go on with the data and the batch size it "
            "was trained with; between two passes they may change."
        )


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
        engine.unproven = str(store.folder / str(number))
    else:
        state = restore_state(engine, store, number, current)
    run.set_to(load_saved(store, number))
    run.forget_data()
    names = tuple(name for name, _ in named_leaves(state))
    return state, Restored(str(store.folder / str(number)), number, names)
