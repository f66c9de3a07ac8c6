"""One training step of a run, run again. Owns the way back to the state before it; the diagnosis is another's."""

import itertools
import pathlib
from collections.abc import Iterator
from typing import Any

from trainkit._core.state import TrainState, key_impl, with_raw_key, with_typed_key
from trainkit._core.typing import Batch
from trainkit._debug.diagnosis import Diagnosis, diagnose
from trainkit._debug.failures import kept_batches, kept_state
from trainkit._engine.engine import Engine
from trainkit._feed.resident import NOTHING
from trainkit._resume.restore import restore_built, restore_state
from trainkit._resume.saved import Saved, load_saved
from trainkit.checkpoint._store import Store
from trainkit.data._source import Source, as_source


class Replay:
    """What a step can be run again from.

    Args:
        engine: of the trainer.
        logdir: where failures are kept, None for nowhere.
        store: the checkpoints, None for none.
        source: the training data, None where there are none at hand.
        accumulate: batches that make one step.
    """

    def __init__(
        self,
        engine: Engine,
        logdir: pathlib.Path | None,
        store: Store | None,
        source: Source | None,
        accumulate: int,
    ) -> None:
        self._engine, self._logdir, self._store = engine, logdir, store
        self._source, self._accumulate = source, accumulate

    def run(self, step: int, current: TrainState | None, *, jit: bool) -> Diagnosis:
        """Runs `step` again; see `Trainer.replay`.

        Args:
            step: updates completed after it.
            current: the state of the trainer, where it has one: for its structure.
            jit: whether to compile it.
        """
        batches, kept = kept_batches(self._logdir, step), kept_state(self._logdir, step)
        if kept is not None and batches is not None:
            return self._diagnose(self._restored(kept, step - 1, current), batches, jit)
        before = [] if self._store is None else [known for known in self._store.steps() if known < step]
        if self._store is None or not before:
            raise FileNotFoundError(
                f"there is no checkpoint before step {step} to replay it from, and no state was kept of it. Train "
                "with tk.callbacks.Checkpoint(), or with NanGuard('raise'), which keeps the state before the step."
            )
        state = self._restored(self._store, before[-1], current)
        groups = self._groups(load_saved(self._store, before[-1]))  # opens nothing before it is asked
        state = self._advance(state, groups, step - 1 - before[-1])
        return self._diagnose(state, batches or self._next(groups, step), jit)

    def _restored(self, store: Store, step: int, current: TrainState | None) -> TrainState:
        if current is None:
            return restore_built(self._engine, store, step)
        return restore_state(self._engine, store, step, current)

    def _groups(self, saved: Saved) -> Iterator[list[Batch]]:
        """Yields the batches of each step after a checkpoint."""
        source = self._source
        if source is None:
            raise ValueError(
                f"the nearest checkpoint is of step {saved.step}: the steps after it need their batches. Write "
                "trainer.replay(step, data=...) with the training data."
            )
        epoch, start = (saved.epoch - 1, saved.batch) if saved.batch else (saved.epoch, 0)
        for number in itertools.count(epoch):
            batches = iter(self._engine.batches(source, number, start if number == epoch else 0))
            while group := list(itertools.islice(batches, self._accumulate)):
                yield group

    def _next(self, groups: Iterator[list[Batch]], step: int) -> list[Batch]:
        group = next(groups, None)
        if group is None:
            raise ValueError(f"the data ended before step {step}; give those that the run was trained on.")
        return group

    def _advance(self, state: TrainState, groups: Iterator[list[Batch]], steps: int) -> TrainState:
        if not steps:
            return state
        first = self._next(groups, int(state.step) + 1)
        assert self._source is not None
        prepared = self._engine.prepare_train(state, self._source, first[0])
        raw, packed, first_step = with_raw_key(state), prepared.empty, int(state.step)
        for step, group in enumerate(
            itertools.chain([first], itertools.islice(groups, steps - 1)), first_step
        ):
            fed, held = self._placed(prepared.feed, group), self._engine.held(NOTHING, step)
            raw, packed = prepared.step(raw, packed, held, fed.batch, fed.mask)
        return with_typed_key(raw, key_impl(state))

    def _diagnose(self, state: TrainState, batches: list[Batch], jit: bool) -> Diagnosis:
        units = self._engine.steps.units
        source = as_source(batches, units=units) if self._source is None else self._source
        feed = self._engine.prepare_train(state, source, batches[0]).feed
        fed = self._placed(feed, batches)
        engine = self._engine
        given, _ = engine.held(NOTHING, int(state.step))
        return diagnose(engine.steps, engine.strategy, given, state, fed.batch, fed.mask, jit=jit)

    def _placed(self, feed: Any, group: list[Batch]) -> Any:
        return feed.place(group[0]) if self._accumulate == 1 else feed.place_group(tuple(group))
