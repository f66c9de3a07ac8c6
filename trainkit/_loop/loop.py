"""One fit: the order of everything that happens in it, and nothing else.

The step runs alone between two steps at which host code is due; `_due` knows the next one. Order at such a
step: `on_step` (guards, writers, monitors), the evaluation with its hooks, `on_epoch_end` where the pass is done,
`on_step` of checkpoints. So a checkpoint holds all that was done at its step. A signal breaks off before the
evaluation; then the checkpoint says what is owed, and the fit that goes on with it settles that first.
"""

import functools
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from trainkit._calls.choice import Choice
from trainkit._core.cadence import NEVER, Every
from trainkit._core.history import History
from trainkit._core.position import Position
from trainkit._core.state import TrainState, with_raw_key, with_typed_key
from trainkit._core.typing import Batch
from trainkit._debug.failures import Failures
from trainkit._engine.engine import Engine, key_impl
from trainkit._feed.intake import Intake, RowIntake
from trainkit._loop.dispatch import Dispatcher, before_checkpoints, checkpoints, guards
from trainkit._loop.evaluate import evaluate
from trainkit._loop.interrupts import Interrupts, agree
from trainkit._loop.record import Record
from trainkit._loop.request import Request, plan_of
from trainkit._loop.result import FitResult
from trainkit._loop.timetable import Chore, Timetable
from trainkit._loop.train_metrics import NO_METRICS, TrainMetrics
from trainkit._resume.choose import newest_of
from trainkit._resume.restore import restore_state
from trainkit._resume.saved import Saved, contents_of, load_saved
from trainkit.callbacks._callback import Callback, Rollback, Save, Stop, Update
from trainkit.callbacks._checkpoint import Checkpoint
from trainkit.callbacks._info import Info
from trainkit.checkpoint._store import Contents
from trainkit.data._arrays import RowNumbers
from trainkit.data._batch import batch_size_of, check_batch, spec_of
from trainkit.metrics._accumulator import Accumulator
from trainkit.writers._writer import MetricWriter

_LOG = logging.getLogger("trainkit")
# Carried float32 sums and int32 counts are handed to the host at least this often, and merged there in float64.
_SEGMENT = Every(steps=512)
# How often several processes agree on the time and on signals: each time costs a round trip.
_MEETING = Every(steps=32)


class Loop:
    """Runs one fit."""

    def __init__(
        self,
        engine: Engine,
        request: Request,
        *,
        state: TrainState,
        first: Batch,
        batches: Iterator[Batch],
        position: Position,
        writer: MetricWriter,
        history: History,
        interrupts: Interrupts,
        resumed: Saved | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._raw, self._impl, self.position = with_raw_key(state), key_impl(state), position
        self.stopped_by: str | None = None
        self._engine, self._request, self._history, self._clock = engine, request, history, clock
        self._interrupts = interrupts
        self._supply = engine.supply(request.source)
        # Where data are held their rows are numbered from here on.
        self._batches = None if self._supply.holds else itertools.chain([first], batches)
        position.rows = request.source.batch_size or max(position.rows, batch_size_of(spec_of(first)))
        self._prepared = engine.prepare_train(state, request.source, first, position.rows)
        self._step = int(state.step) if resumed is None else resumed.step
        begun = position.epoch - (1 if position.batch else 0)
        self._first_step, self._first_epoch = self._step, begun
        if resumed is not None:
            self._first_step, self._first_epoch = resumed.first_step, resumed.first_epoch
        self._plan = plan_of(request, self._step, position, self._first_step, self._first_epoch)
        given = None if resumed is None or resumed.choice is None else Choice.parse(resumed.choice)
        held = engine.strategy.replicate(self._supply.held)
        feed = self._prepared.feed
        feed.on_padding = lambda one: engine.check_training(feed, self._step, self._raw, held, one)
        self._prepared.calls.begin(given, self._plan.steps and self._plan.steps - self._step, held)
        self._metrics = TrainMetrics(self._prepared.accumulator, self._prepared.empty)
        self._record = Record(request.callbacks, writer, history, self._metrics)
        self._epoch_reader = self._metrics.reader("epoch")
        self._eval_metrics: Mapping[str, Any] = NO_METRICS
        self._epoch_metrics: Mapping[str, Any] = NO_METRICS
        self._started, self._agreed_seconds = clock(), 0.0
        self._together = engine.strategy.processes > 1
        self._dispatch = Dispatcher(request.callbacks, self._info, self._act)
        self._keepers = [callback for callback in request.callbacks if isinstance(callback, Checkpoint)]
        self._wanted: set[int] = set()
        self._rollback: tuple[Callback, str] | None = None
        self._owed_evaluation = self._owed_epoch_end = self._goes_on = False
        self._pass_begun = self._pass_told = False
        self._failures = Failures(engine, request.source, request.accumulate, request.logdir)
        if resumed is not None:
            self._record.take_back(resumed, engine.strategy.replicate)
            self.stopped_by = resumed.stopped_by
            self._owed_evaluation, self._owed_epoch_end = resumed.evaluation_owed, resumed.epoch_end_owed
            self._goes_on = position.batch > 0
        self._make_timetables()

    @property
    def state(self) -> TrainState:
        """The train state after the last step."""
        return with_typed_key(self._raw, self._impl)

    # One fit --------------------------------------------------------------------------------------------------

    def run(self) -> FitResult:
        """Runs to the end, to a stop, or to the first exception, which is raised after everything is closed."""
        error: BaseException | None = None
        try:
            self._dispatch.start()
            if self._owed_evaluation or self._owed_epoch_end:
                self._settle()
                self._stop_if_interrupted()  # before another step, which would owe other things
                self._save(everyone=True)
            while not self._finished():
                self._epoch()
            self._dispatch.call("on_fit_end")
            if self._rollback is not None:
                self._roll_back()
        except BaseException as exc:
            error = exc
            self._failures.keep(exc, self.state)
            self._dispatch.exception(exc)
        errors = [*([] if error is None else [error]), *self._dispatch.close()]
        if errors:
            for other in errors[1:]:
                errors[0].add_note(f"close of a callback raised as well: {other!r}")
            raise errors[0]
        return FitResult(
            state=self.state,
            step=int(self._raw.step),
            epoch=self.position.epoch,
            seconds=self._clock() - self._started,
            # A signal that came after the last step was not acted upon, and is not to be swallowed.
            stopped_by=self.stopped_by or self._interrupts.noted,
            history=self._history,
        )

    def _make_timetables(self) -> None:
        self._steppers = Timetable(self._dispatch.implementing("on_step"), self._step)
        evaluation = Chore(self._request.eval_every or Every(epochs=1), self._evaluate)
        self._evaluations = Timetable([evaluation] if self._request.evaluations else [], self._step)
        self._chores = Timetable(self._make_chores(), self._step)

    def _make_chores(self) -> list["Chore"]:
        chores = [Chore(_SEGMENT, self._metrics.cut)]
        ahead = self._engine.strategy.in_flight
        if ahead:
            chores.append(Chore(Every(steps=ahead), lambda: jax.block_until_ready(self._metrics.packed)))
        if self._together:
            chores.append(Chore(_MEETING, self._meet))
        return chores

    def _meet(self) -> None:
        seconds = self._clock() - self._started
        self._agreed_seconds, self._interrupts.received = agree(seconds, self._interrupts.noted)

    def _seconds(self) -> float:
        """Returns the seconds since the fit began, the same on every process."""
        return self._agreed_seconds if self._together else self._clock() - self._started

    def _finished(self) -> bool:
        return self.stopped_by is not None or self._over()

    def _over(self) -> bool:
        """Says whether all that was asked for is done."""
        plan = self._plan
        if self._request.steps is not None:
            return plan.steps is not None and self._step >= plan.steps
        return plan.epochs is not None and self.position.epoch >= plan.epochs and self.position.batch == 0

    @property
    def _interrupted(self) -> bool:
        return self._interrupts.received is not None

    # One pass over the data -----------------------------------------------------------------------------------

    def _epoch(self) -> None:
        begins, goes_on, self._goes_on = self.position.batch == 0, self._goes_on, False
        self._pass_begun, self._pass_told = not begins, False
        if begins:
            self.position.epoch += 1
        self._failures.begin(self._step, self.position)
        try:
            intake = self._open_pass()
            if not goes_on:
                self._dispatch.call("on_epoch_start")
                self._epoch_reader.take()
            if self.stopped_by is None:
                self._run_pass(intake)
            if not self._pass_told and not self._interrupted:
                self._end_pass()
        finally:
            # Broken off before its first step, a pass was not begun: the next fit goes on with it.
            if not self._pass_begun:
                self.position.epoch -= 1

    def _end_pass(self) -> None:
        self._pass_told = True
        told = self._dispatch.implementing("on_epoch_end")
        if any(callback.reads_epoch for callback in told):
            self._metrics.cut()
            self._epoch_metrics = self._epoch_reader.take()
        self._dispatch.call_each("on_epoch_end", told)
        self._epoch_metrics = NO_METRICS

    def _open_pass(self) -> Intake | RowIntake:
        batches, self._batches = self._batches, None
        if batches is None:
            batches = self._supply.batches(self.position.epoch - 1, self.position.batch)
        feed = self._prepared.feed
        if self._request.accumulate > 1:
            return Intake(_grouped(batches, self._request.accumulate), feed.place_group)
        if isinstance(batches, RowNumbers):
            return RowIntake(batches, feed.place)
        return Intake(batches, feed.place)

    def _run_pass(self, intake: Intake | RowIntake) -> None:
        calls, metrics = self._prepared.calls, self._metrics
        more = intake.more()
        if not more:
            raise ValueError(
                f"the training source gave no batch in epoch {self.position.epoch}. It must give batches for every "
                "epoch; an iterator that is used up can be wrapped in a function that opens a new one."
            )
        self._engine.wait_for("training")
        calls.open(self._raw, metrics.packed, intake.first())
        due, alarm, interrupts = self._due(), self._alarm(), self._interrupts
        while more:
            feds = intake.take(calls.room(due - self._step), calls.takes)
            try:
                self._raw, metrics.packed = calls(self._raw, metrics.packed, feds)
            except Exception as error:
                read = [fed._replace(batch=self._supply.read(fed.batch)) for fed in feds]
                self._failures.note(self._step + 1, read)
                if isinstance(error, TypeError):
                    for fed in read:  # names the leaf that no step can take, where that was the reason
                        check_batch(fed.batch)
                raise
            self._step += len(feds)
            self.position.batch += sum([fed.batches for fed in feds])
            self._pass_begun = True
            # Looking one batch ahead tells whether this was the last step of the pass, and overlaps the step.
            try:
                more = intake.more()
            except Exception:
                if self._step >= due:
                    self._at_step(pass_done=False)  # the step was done, and what is due after it is told
                raise
            rung = alarm < NEVER and self._clock() >= alarm
            if self._step >= due or not more or rung or interrupts.received:
                if not more:
                    self.position.batch = 0
                calls.pause()
                self._at_step(pass_done=not more)
                if self._finished():
                    break
                due, alarm = self._due(), self._alarm()
                if more:
                    calls.resume()

    def _due(self) -> float:
        """Returns the next step at which the host has anything to do."""
        end = NEVER if self._plan.steps is None else self._plan.steps
        return min(self._steppers.next_step, self._evaluations.next_step, self._chores.next_step, end)

    def _alarm(self) -> float:
        """Returns the next time on the clock at which the host has anything to do."""
        if self._together:
            return NEVER  # processes look at the time where they meet, all at the same step
        return self._started + min(self._steppers.next_time, self._evaluations.next_time)

    def _at_step(self, *, pass_done: bool) -> None:
        epoch = self.position.epoch if pass_done else None
        for chore in self._chores.take_due(self._step, epoch, 0.0):
            chore.run()
        self._stop_if_interrupted()
        now = self._seconds()
        steppers = self._steppers.take_due(self._step, epoch, now)
        evaluations = self._evaluations.take_due(self._step, epoch, now)
        if self._together and steppers:
            # Here on all processes, in case a callback looks at its metrics on one of them only.
            self._metrics.cut()
        self._dispatch.call_each("on_step", guards(steppers))
        if self._rollback is None:
            self._dispatch.call_each("on_step", before_checkpoints(steppers))
            # Told nothing else, a fit that ends inside a pass is evaluated where it ends.
            stopped = self.stopped_by is not None and not self._interrupted
            ending = self._request.eval_every is None and (stopped or self._over())
            self._owed_evaluation = bool(self._request.evaluations) and (bool(evaluations) or ending)
            self._owed_epoch_end = pass_done
            self._settle()
        if self._rollback is not None:
            self._roll_back()
            return
        self._dispatch.call_each("on_step", checkpoints(steppers))
        self._stop_if_interrupted()  # a signal that came meanwhile: what was due is done, and can be saved
        self._save()

    def _settle(self) -> None:
        """Evaluates and ends the pass, where that is due and until a signal comes."""
        if self._owed_evaluation and not self._interrupted:
            self._owed_evaluation = not self._evaluate()
        if self._owed_epoch_end and not self._interrupted and self._rollback is None:
            self._owed_epoch_end = False
            self._end_pass()

    def _stop_if_interrupted(self) -> None:
        if self._interrupts.received is not None:
            self.stopped_by = self.stopped_by or self._interrupts.received

    # Evaluation -----------------------------------------------------------------------------------------------

    def _evaluate(self) -> bool:
        """Evaluates, and says whether that was done to the end."""
        self._dispatch.call("on_eval_start")
        if self._rollback is not None:
            return False
        state = self._engine.averaged(self.state)
        metrics: dict[str, Any] = {}
        for name, source in self._request.evaluations.items():
            values = evaluate(self._engine, state, source, lambda: self._interrupts.received is not None)
            if values is None:
                self._stop_if_interrupted()
                return False
            metrics |= {f"{name}/{metric}": value for metric, value in values.items()}
        self._eval_metrics = metrics
        self._dispatch.call("on_eval_end")
        self._eval_metrics = NO_METRICS
        return True

    # Saving and going back ------------------------------------------------------------------------------------

    def _save(self, *, everyone: bool = False) -> None:
        wanted, self._wanted = self._wanted, set()
        keepers = [one for one in self._keepers if everyone or self._finished() or id(one) in wanted]
        if keepers:
            self._dispatch.call("on_save")
        if self._rollback is not None:
            self._roll_back()
            return
        for keeper in keepers:
            keeper.save(self._step, self._contents)

    def _contents(self, labels: Mapping[str, Any]) -> Contents:
        saved = Saved(
            step=self._step,
            fit=self._request.fit,
            first_step=self._first_step,
            first_epoch=self._first_epoch,
            epoch=self.position.epoch,
            batch=self.position.batch,
            rows=self.position.rows,
            evaluation_owed=self._owed_evaluation,
            epoch_end_owed=self._owed_epoch_end,
            stopped_by=None if self._interrupted else self.stopped_by,
            choice=None if (choice := self._prepared.calls.choice) is None else str(choice),
            **self._record.state(self._step),
        )
        return contents_of(self.state, saved, labels)

    def _roll_back(self) -> None:
        assert self._rollback is not None
        (callback, reason), self._rollback = self._rollback, None
        if not self._keepers:
            raise RuntimeError(
                f"{reason}; there is no checkpoint to go back to: add tk.callbacks.Checkpoint()."
            )
        for keeper in self._keepers:
            keeper.store.wait()
        found = newest_of([keeper.store for keeper in self._keepers])
        if found is None:
            raise RuntimeError(f"{reason}; no checkpoint was saved yet to go back to: save earlier.")
        store, step = found
        _LOG.warning(
            "%s: back from step %d to %d; the batches since are passed over.", reason, self._step, step
        )
        self._raw = with_raw_key(restore_state(self._engine, store, step, self.state))
        self._step = step
        self._metrics.clear()
        self._record.take_back(load_saved(store, step), self._engine.strategy.replicate, without=callback)
        self._plan = plan_of(self._request, self._step, self.position, self._first_step, self._first_epoch)
        self._make_timetables()
        self._failures.begin(self._step, self.position)

    # What callbacks are told, and what they ask for -----------------------------------------------------------

    def _info(self, callback: Callback, hook: str) -> Info:
        return Info(
            step=self._step,
            epoch=self.position.epoch,
            state=lambda: self.state,
            metrics=functools.partial(self._metrics_for, callback, hook),
            history=self._history,
            logdir=self._request.logdir,
            writer=self._record.writer(callback),
            plan=self._plan,
            seconds=self._clock() - self._started,
            direction=functools.partial(direction_of, self._prepared.accumulator),
        )

    def _metrics_for(self, callback: Callback, hook: str) -> Mapping[str, Any]:
        if hook in ("on_step", "on_fit_end", "on_exception"):
            self._metrics.cut()
            return self._record.reader(callback).take()
        if hook == "on_eval_end":
            return self._eval_metrics
        return self._epoch_metrics

    def _act(self, callback: Callback, action: Stop | Update | Save | Rollback) -> None:
        if isinstance(action, Save):
            keepers = [callback] if isinstance(callback, Checkpoint) else self._keepers
            if not keepers:
                raise RuntimeError(
                    f"{type(callback).__name__} returned Save, and nothing saves: add tk.callbacks.Checkpoint()."
                )
            self._wanted |= {id(keeper) for keeper in keepers}
            return
        if isinstance(action, Rollback):
            self._rollback = self._rollback or (callback, action.reason)
            return
        if isinstance(action, Stop):
            self.stopped_by = self.stopped_by or action.reason
            return
        new = self._engine.updated(self.state, action.fn, by=type(callback).__name__)
        self._raw = with_raw_key(new)


def _grouped(batches: Iterator[Batch], size: int) -> Iterator[tuple[Batch, ...]]:
    while group := tuple(itertools.islice(batches, size)):
        yield group


def direction_of(accumulator: Accumulator, name: str) -> str | None:
    """Returns "min" or "max" for a full metric name such as `eval/accuracy`, None where nothing is registered."""
    return accumulator.direction(name.rsplit("/", 1)[-1])
