"""Saving a run, and going back to what was saved. Owns neither files nor the moments at which it is done."""

import logging
from collections.abc import Mapping
from typing import Any

from trainkit._calls.calls import Calls
from trainkit._engine.engine import Engine
from trainkit._loop.record import Record
from trainkit._loop.request import Request
from trainkit._loop.standing import Standing
from trainkit._loop.train_metrics import TrainMetrics
from trainkit._resume.choose import newest_of
from trainkit._resume.restore import restore_state
from trainkit._resume.saved import Saved, contents_of, load_saved
from trainkit._resume.weights import weights_of
from trainkit.callbacks._checkpoint import Checkpoint, MakeContents
from trainkit.checkpoint._store import Contents

_LOG = logging.getLogger("trainkit")


class Saving:
    """The checkpoints of one fit.

    Args:
        engine: of the trainer.
        request: what the fit was asked.
        standing: where it stands.
        metrics: of its steps.
        record: its logs.
        calls: how its steps are dispatched.
    """

    def __init__(
        self,
        engine: Engine,
        request: Request,
        standing: Standing,
        metrics: TrainMetrics,
        record: Record,
        calls: Calls,
    ) -> None:
        self._engine, self._request, self._standing = engine, request, standing
        self._metrics, self._record, self._calls = metrics, record, calls
        self._keepers = [one for one in request.callbacks if isinstance(one, Checkpoint)]
        self._said = False

    def due(self, *, everyone: bool) -> list[Checkpoint]:
        """Returns what is to save after this step, and forgets that it was asked to."""
        wanted, self._standing.wanted = self._standing.wanted, set()
        return [one for one in self._keepers if everyone or id(one) in wanted]

    def save(self, keepers: list[Checkpoint], place: Mapping[str, Any] | None, *, interrupted: bool) -> None:
        """Begins to save.

        Args:
            keepers: where to.
            place: where the source stands, None where its number of batches tells.
            interrupted: whether a signal ended the fit, which a resumed run goes on with.
        """
        for keeper in keepers:
            keeper.save(self._standing.step, self._maker(keeper, place, interrupted))

    def say_there_is_none(self) -> None:
        """Answers a signal to save where nothing saves, once."""
        if not self._said:
            _LOG.warning(
                "SIGUSR1: nothing was saved, for this fit has no tk.callbacks.Checkpoint(). It goes on."
            )
        self._said = True

    def stand_back(self) -> None:
        """Has every checkpoint end at the step to which the run went back at its end."""
        for keeper in self._keepers:
            keeper.stand_at(self._standing.step, self._maker(keeper, None, False))

    def roll_back(self) -> None:
        """Goes back to the newest checkpoint, as a callback asked."""
        standing = self._standing
        assert standing.rollback is not None
        (callback, reason), standing.rollback = standing.rollback, None
        keepers = [keeper for keeper in self._keepers if not keeper.weights_only]
        if not keepers:
            raise RuntimeError(
                f"{reason}; there is no checkpoint to go back to: add tk.callbacks.Checkpoint()."
            )
        for keeper in keepers:
            keeper.store.wait()
        found = newest_of([keeper.store for keeper in keepers])
        if found is None:
            raise RuntimeError(f"{reason}; no checkpoint was saved yet to go back to: save earlier.")
        store, step = found
        _LOG.warning(
            "%s: back from step %d to %d; the batches since are passed over.", reason, standing.step, step
        )
        standing.state = restore_state(self._engine, store, step, standing.state)
        standing.step = step
        self._metrics.clear()
        self._record.take_back(load_saved(store, step), self._engine.strategy.replicate, without=callback)
        standing.plan_anew(self._request)

    def _maker(self, keeper: Checkpoint, place: Mapping[str, Any] | None, interrupted: bool) -> MakeContents:
        return lambda labels: self._contents(keeper, labels, place, interrupted)

    def _contents(
        self,
        keeper: Checkpoint,
        labels: Mapping[str, Any],
        place: Mapping[str, Any] | None,
        interrupted: bool,
    ) -> Contents:
        standing, choice = self._standing, self._calls.choice
        saved = Saved(
            step=standing.step,
            fit=self._request.fit,
            first_step=standing.first_step,
            first_epoch=standing.first_epoch,
            epoch=standing.position.epoch,
            batch=standing.position.batch,
            rows=standing.position.rows,
            evaluation_owed=standing.evaluation_owed,
            epoch_end_owed=standing.epoch_end_owed,
            stopped_by=None if interrupted else standing.stopped_by,
            choice=None if choice is None else str(choice),
            data=self._request.source.facts(),
            place=place,
            came_to=standing.came_to,
            frozen=self._engine.steps.constants.fingerprint(self._engine.strategy),
            **self._record.state(standing.step),
        )
        state = standing.state
        return contents_of(
            state, saved, labels, weights_of(self._engine, state) if keeper.weights_only else None
        )
