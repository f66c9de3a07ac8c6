"""Where a trainer stands in its run, over all of its fits. Owns what a checkpoint sets back; trains nothing."""

import contextlib
import copy
import os
import pathlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from trainkit._core.history import History
from trainkit._core.position import Position
from trainkit._core.state import TrainState
from trainkit._core.tree import copy_arrays, named_leaves
from trainkit._engine.engine import Engine
from trainkit._feed.stream import Stream
from trainkit._loop.standing import Standing
from trainkit._loop.stopwatch import Stopwatch
from trainkit._resume.choose import choose, newest_of
from trainkit._resume.restore import Restored, restore_built, restore_partly, restore_state
from trainkit._resume.saved import Saved, is_weights_only, load_saved
from trainkit._resume.weights import restore_weights
from trainkit.callbacks._callback import AFRESH, Callback
from trainkit.checkpoint._store import Store
from trainkit.data._base import Source
from trainkit.writers._writer import MetricWriter

_SERVES = "_run_it_serves"

FIT_INSTEAD = "return tk.Stop(reason) from the hook to end this one, and call fit after it"
"""What to do about a fit within a fit."""


class Ongoing:
    """A fit that runs.

    Attributes:
        standing: where it stands, None before its first step can run.
        watch: where its time goes.
        thread: in which it runs.
    """

    def __init__(self) -> None:
        self.standing: Standing | None = None
        self.watch = Stopwatch()
        self.thread = threading.current_thread()
        self._copied_from: TrainState | None = None
        self._copy: Callable[[], TrainState | None] = lambda: None

    def copy(self, standing: Standing) -> TrainState:
        """Returns a copy of the state, which no step takes: the same as long as it is held and no step ran."""
        copy = self._copy() if self._copied_from is standing.raw else None
        if copy is None:
            copy = copy_arrays(standing.state)
            self._copied_from, self._copy = standing.raw, weakref.ref(copy)
        return copy


class Run:
    """The run of one trainer.

    Attributes:
        history: every scalar logged.
        position: where it stands in its data.
        fits: how many were begun.
        data: what the last of them trained on, None before the first.
        state: the train state between fits, None before there is one.
        shown: whether the user may hold it, so that a step must not take its buffers.
        place: where the source stood in the process that the run is taken up from, None where nothing is known.
        behind: whether logs and history hold more than the step at which the run stands.
        has_folder: whether it has begun to log to the trainer's folder.
        restored_from: the folder of checkpoints that `restore` took its state from, None where it did not.
    """

    _ongoing: Ongoing | None = None

    def __init__(self) -> None:
        self.history, self.position, self.fits = History(), Position(), 0
        self.data: Any = None
        self.state: TrainState | None = None
        self.shown = self.behind = self.has_folder = False
        self.restored_from: pathlib.Path | None = None
        self._identity = object()
        self.place: Mapping[str, Any] | None = None
        self._catching_up = True
        self._facts: Mapping[str, Any] = {}
        self._open: dict[int, tuple[Any, Source, Stream | None]] = {}

    # During a fit ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def fitting(self) -> Iterator[Ongoing]:
        """Has everything that is asked within answered by the fit that runs; refuses a second one.

        Raises:
            RuntimeError: one runs.
        """
        ongoing = Ongoing()
        # Set where it is not, in one go: of two threads one is refused. (A lock could not be copied with its trainer.)
        while vars(self).setdefault("_ongoing", ongoing) is not ongoing:
            self.refuse_in_fit("fit", FIT_INSTEAD)
        try:
            yield ongoing
        finally:
            del vars(self)["_ongoing"]

    def refuse_in_fit(self, what: str, instead: str) -> None:
        """Refuses what would pull the state from under a fit that runs.

        Args:
            what: was asked of the trainer.
            instead: what to do about it in a hook.

        Raises:
            RuntimeError: a fit runs.
        """
        self._check_thread(what)
        if self._ongoing is not None:
            raise RuntimeError(f"trainer.{what} was called while trainer.fit runs: {instead}.")

    def current(self, what: str) -> TrainState | None:
        """Returns the train state of this moment, which the next step takes; None where there is none.

        Args:
            what: was asked of the trainer.

        Raises:
            RuntimeError: a fit runs in another thread.
        """
        self._check_thread(what)
        standing = self._standing
        return self.state if standing is None else standing.state

    def show(self) -> TrainState | None:
        """Returns the train state of this moment for the user to hold: a copy where a fit runs."""
        self._check_thread("state")
        if (standing := self._standing) is not None:
            assert self._ongoing is not None
            return self._ongoing.copy(standing)
        self.shown = True
        return self.state

    def timed(self, part: str) -> contextlib.AbstractContextManager[None]:
        """Counts what happens within for a part of the fit that runs, if one does."""
        return contextlib.nullcontext() if self._ongoing is None else self._ongoing.watch.on(part)

    @property
    def _standing(self) -> Standing | None:
        return None if self._ongoing is None else self._ongoing.standing

    def _check_thread(self, what: str) -> None:
        ongoing = self._ongoing
        if ongoing is not None and ongoing.thread is not threading.current_thread():
            raise RuntimeError(
                f"trainer.{what} was called in the thread {threading.current_thread().name!r} while trainer.fit runs "
                f"in {ongoing.thread.name!r}: a trainer belongs to one thread during a fit. Ask in a hook of a "
                "callback (info.evaluate, info.predict, info.apply), wait for the fit, or make another trainer."
            )

    # Between fits ---------------------------------------------------------------------------------------------

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

    def become(self, state: TrainState, *, shown: bool) -> None:
        """Stands at a state that no fit of this run came to: another run, for which callbacks begin afresh."""
        self.state, self.shown, self.behind, self._identity = state, shown, False, object()
        self.restored_from = None

    def adopt(self, callbacks: Sequence[Callback]) -> None:
        """Has callbacks that served another run begin afresh; the others go on."""
        for callback in callbacks:
            known = vars(callback)
            if known.get(_SERVES) is self._identity:
                continue
            if _SERVES in known:
                callback.reset()
            elif callback.implements("state_dict") and callback.implements("load_state_dict"):
                # What it is to go back to; one that can't tell before its first fit has a `reset` of its own.
                with contextlib.suppress(Exception):
                    known[AFRESH] = copy.deepcopy(callback.state_dict())
            known[_SERVES] = self._identity

    def take_back(self, writer: MetricWriter) -> None:
        """Takes back what was logged after the step at which the run stands, for a fit that goes on from there."""
        if self.behind:
            writer.rewind(
                self.steps_done + 1, ()
            )  # at that step nothing stays, and at the one before it all does
            self.history.rewind(self.steps_done)
        self.behind = False

    def forget_data(self) -> None:
        """Takes whatever the next fit trains on for the data in which the run stands."""
        self.data, self.position.rows = None, 0
        self._open.clear()

    @property
    def steps_done(self) -> int:
        """Updates completed."""
        return 0 if self.state is None else int(self.state.step)

    def find(self, stores: Sequence[Store], writer: MetricWriter) -> tuple[Store, Saved] | None:
        """Returns where an earlier process left the run, None where there is nothing of it left to catch up with.

        Args:
            stores: its checkpoints; none where it is not to be resumed.
            writer: of the logs.
        """
        if not stores or not self._catching_up:
            return None
        for store in stores:
            store.clean()  # first of all: what a full disk broke off may take the room that the logs need
        newest = newest_of(stores)
        if newest is None:
            # Killed before its first checkpoint, a run leaves logs all the same.
            writer.rewind(self.steps_done, ())
            return None
        if is_weights_only(*newest):
            raise ValueError(
                f"the newest checkpoint in {newest[0].folder}, of step {newest[1]}, holds weights only "
                "(Checkpoint(weights_only=True)): no run can be resumed from it. Begin another run from it, in another "
                "logdir: trainer.restore(path), then fit without resume=True."
            )
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
        self.behind = saved.came_to is not None
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
    path: str | os.PathLike[str],
    step: int | str,
    partial: bool | Sequence[str],
) -> Restored:
    """Sets `run` to where a checkpoint was, or takes what fits of its model; see `Trainer.restore`."""
    (store, number), current = choose(path, step), run.state
    if partial is not False:
        if current is None:
            raise RuntimeError("partial= fills in a state there is: call trainer.init(batch) first.")
        only = None if partial is True else (partial,) if isinstance(partial, str) else tuple(partial)
        state, restored = restore_partly(engine, store, number, current, only)
        run.become(state, shown=False)
        return restored
    if is_weights_only(store, number):
        state, restored = restore_weights(engine, store, number, current)
        run.become(state, shown=False)
        if current is None:
            engine.unproven = restored.path
        return restored
    if current is None:
        state = restore_built(engine, store, number)
        engine.unproven = str(store.folder / str(number))
    else:
        state = restore_state(engine, store, number, current)
    run.become(state, shown=False)
    run.set_to(load_saved(store, number))
    run.forget_data()
    run.restored_from = store.folder
    names = tuple(name for name, _ in named_leaves(state))
    return Restored(str(store.folder / str(number)), number, names)
