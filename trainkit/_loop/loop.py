"""One fit: the order of everything that happens in it, and nothing else.

The step runs alone between two steps at which host code is due; `_due` knows the next one. Order at such a
step: `on_step` (guards, writers, monitors), the evaluation with its hooks, `on_epoch_end` where the pass is done,
`on_step` of checkpoints. So a checkpoint holds all that was done at its step. A signal breaks off before the
evaluation; then the checkpoint says what is owed, and the fit that goes on with it settles that first.
"""

import logging
from collections.abc import Iterator
from typing import Any

import jax

from trainkit._calls.choice import Choice
from trainkit._core.cadence import NEVER, At, Every
from trainkit._core.history import History
from trainkit._core.position import Position
from trainkit._core.state import TrainState
from trainkit._core.typing import Batch, PyTree
from trainkit._debug.failures import Failures
from trainkit._engine.engine import Engine
from trainkit._feed.intake import Intake, RowIntake, intake_of
from trainkit._feed.stream import Stream
from trainkit._loop.costs import Costs, show_batches
from trainkit._loop.dispatch import Dispatcher, before_checkpoints, checkpoints, guards
from trainkit._loop.interrupts import Interrupts
from trainkit._loop.looks import Looks, wait_for
from trainkit._loop.meetings import EVERY, Meetings
from trainkit._loop.probing import Probing
from trainkit._loop.record import Record
from trainkit._loop.request import LAST_STEP, Request, refuse_overflow
from trainkit._loop.result import FitResult, summarized
from trainkit._loop.saving import Saving
from trainkit._loop.standing import standing_of
from trainkit._loop.stepping import stepping
from trainkit._loop.stopwatch import Stopwatch
from trainkit._loop.timetable import Chore, Timetable
from trainkit._loop.told import Told
from trainkit._loop.train_metrics import NO_METRICS, TrainMetrics, read_only
from trainkit._resume.saved import Saved
from trainkit.data._batch import batch_size_of, spec_of
from trainkit.writers._writer import MetricWriter

_LOG = logging.getLogger("trainkit")
# Carried float32 sums and int32 counts are handed to the host at least this often, and merged there in float64.
_SEGMENT = Every(steps=512)


class Loop:
    """Runs one fit.

    Attributes:
        standing: where it stands.
    """

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
        watch: Stopwatch,
        resumed: Saved | None = None,
    ) -> None:
        self._engine, self._request, self._history, self._watch = engine, request, history, watch
        self._interrupts, self._clock = interrupts, watch.clock
        self._supply = engine.supply(request.source)
        position.rows = request.source.batch_size or max(position.rows, batch_size_of(spec_of(first)))
        self._prepared = engine.prepare_train(state, request.source, first, position.rows)
        self.standing = standing_of(request, state, position, resumed)
        # Where data are held their rows are numbered from here on.
        begun = position.epoch - (1 if position.batch else 0)
        batches = self._supply.batches(begun, position.batch) if self._supply.holds else batches
        self._begin_calls(resumed)
        self._metrics = TrainMetrics(self._prepared.accumulator, self._prepared.empty, self._wait_for)
        self._record = Record(request.callbacks, writer, history, self._metrics)
        self._epoch_reader = self._metrics.reader("epoch")
        self._started, self._together = self._clock(), engine.strategy.processes > 1
        self._meetings = Meetings(interrupts, self._since, self.standing.step, together=self._together)
        self._told = Told(
            engine,
            request,
            self.standing,
            self._metrics,
            self._prepared.accumulator,
            self._record,
            self._seconds,
            watch,
            Costs(watch, self.standing, self._prepared.calls.flops),
            lambda callback: self._probing.values_for(callback),
        )
        self._dispatch = Dispatcher(request.callbacks, self._told.info, self._told.act)
        self._probing = Probing(self._dispatch.implementing("on_step"), self.standing, request.accumulate)
        looking = self._dispatch.implementing("_see_batch")
        self._show = show_batches(looking, self._supply, request.accumulate, watch)
        self._intake, self._opened = self._intake_of(batches), True
        self._saving = Saving(
            engine, request, self.standing, self._metrics, self._record, self._prepared.calls
        )
        self._looks = Looks(
            engine, request, self.standing, self._meetings, interrupts, watch, together=self._together
        )
        self._goes_on = self._pass_begun = self._pass_told = False
        self._failures = Failures(engine, request.source, request.accumulate, request.logdir)
        if resumed is not None:
            self._record.take_back(resumed, engine.strategy.replicate)
            self._goes_on = position.batch > 0
        self._make_timetables()

    def _begin_calls(self, resumed: Saved | None) -> None:
        given = None if resumed is None else Choice.recall(resumed.choice)
        steps = self.standing.plan.steps
        feed, engine, standing = self._prepared.feed, self._engine, self.standing
        self._data = engine.strategy.replicate(self._supply.held)
        held = engine.held(self._data, standing.step)
        feed.on_padding = lambda one: engine.padding.training(
            feed, standing.step, standing.raw, standing.impl, held, one
        )
        self._prepared.calls.begin(given, steps and steps - self.standing.step, held)

    @property
    def unread(self) -> Stream | None:
        """The pass that the fit stopped in, to be gone on with; None where it is reached by its number alone."""
        return self._intake.put_down(self.standing.position.batch)

    # One fit --------------------------------------------------------------------------------------------------

    def run(self) -> FitResult:
        """Runs to the end, to a stop, or to the first exception, which is raised after everything is closed."""
        standing, error = self.standing, None
        try:
            with self._watch.on("callbacks"):
                self._dispatch.start()
            if standing.evaluation_owed or standing.epoch_end_owed:
                self._settle()
                self._stop_if_interrupted()  # before another step, which would owe other things
                self._save(everyone=True)
            while not self._finished():
                self._epoch()
            self._end()
            if standing.rollback is not None:
                self._roll_back()
        except BaseException as exc:
            error = exc
            self._failures.keep(exc, standing.state)
            self._dispatch.exception(exc)
        with self._watch.on("save"):
            errors = [*([] if error is None else [error]), *self._dispatch.close()]
        if errors:
            for other in errors[1:]:
                errors[0].add_note(f"close of a callback raised as well: {other!r}")
            raise errors[0]
        step = int(standing.raw.step)  # waits for it
        if self._together:
            self._meetings.meet(step, standing.raw)
        self._dispatch.call("_on_result")
        seconds, timing = self._watch.read()
        return FitResult(
            state=standing.state,
            step=step,
            epoch=standing.position.epoch,
            seconds=seconds,
            stopped_by=standing.stopped_by,
            history=self._history,
            timing=timing,
            metrics=summarized(self._history, self._told.direction),
        )

    def _end(self) -> None:
        came_before = self.standing.came_to
        self._told.going_back = "ignored" if self._interrupted else "allowed"
        with self._watch.on("callbacks"):
            self._dispatch.call("on_fit_end")
        self._looks.weights.settle()  # of the state that it went back to, for one
        if self.standing.came_to != came_before:
            with self._watch.on("save"):
                self._saving.stand_back()

    def _make_timetables(self) -> None:
        step = self.standing.step
        self._steppers = Timetable(self._dispatch.implementing("on_step"), step)
        evaluation = Chore(self._request.eval_every or Every(epochs=1), self._evaluate)
        self._evaluations = Timetable([evaluation] if self._request.evaluations else [], step)
        self._chores = Timetable(self._make_chores(), step)

    def _make_chores(self) -> list["Chore"]:
        chores = [Chore(_SEGMENT, self._metrics.cut), Chore(At(steps=(LAST_STEP,)), refuse_overflow)]
        ahead = self._engine.strategy.in_flight
        if ahead:
            chores.append(Chore(Every(steps=ahead), lambda: jax.block_until_ready(self._metrics.packed)))
        if self._together:
            chores.append(Chore(Every(steps=EVERY), self._meet))
        return chores

    def _meet(self) -> None:
        self._meetings.meet(self.standing.step, (self.standing.raw, self._metrics.packed))

    def _since(self) -> float:
        """Returns the seconds since the fit began."""
        return self._clock() - self._started

    def _seconds(self) -> float:
        """Returns the seconds since the fit began, the same on every process."""
        return self._meetings.seconds if self._together else self._since()

    def _finished(self) -> bool:
        standing = self.standing
        return standing.stopped_by is not None or standing.came_to is not None or self._over()

    def _over(self) -> bool:
        """Says whether all that was asked for is done."""
        plan, standing = self.standing.plan, self.standing
        if self._request.steps is not None:
            return plan.steps is not None and standing.step >= plan.steps
        position = standing.position
        return plan.epochs is not None and position.epoch >= plan.epochs and position.batch == 0

    @property
    def _interrupted(self) -> bool:
        return self._interrupts.received is not None

    # One pass over the data -----------------------------------------------------------------------------------

    def _epoch(self) -> None:
        begins, goes_on, self._goes_on = self.standing.position.batch == 0, self._goes_on, False
        self._pass_begun, self._pass_told = not begins, False
        if begins:
            self.standing.position.epoch += 1
        self._failures.begin(self.standing.step, self.standing.position)
        try:
            intake = self._open_pass()
            if not goes_on:
                with self._watch.on("callbacks"):
                    self._dispatch.call("on_epoch_start")
                self._epoch_reader.take()
            if self.standing.stopped_by is None:
                self._run_pass(intake)
            if not self._pass_told and not self._interrupted:
                self._end_pass()
        finally:
            # Broken off before its first step, a pass was not begun: the next fit goes on with it.
            if not self._pass_begun:
                self.standing.position.epoch -= 1

    def _end_pass(self) -> None:
        self._pass_told = True
        told = self._dispatch.implementing("on_epoch_end")
        if any(callback.reads_epoch for callback in told):
            self._metrics.cut()
            self._told.epoch = self._epoch_reader.take()
        self._dispatch.call_each("on_epoch_end", told)
        self._told.epoch = NO_METRICS

    def _open_pass(self) -> Intake | RowIntake:
        position = self.standing.position
        if not self._opened:
            self._intake = self._intake_of(self._supply.batches(position.epoch - 1, position.batch))
        self._opened = False
        return self._intake

    def _intake_of(self, batches: Iterator[Any]) -> Intake | RowIntake:
        group, keeps = self._request.accumulate, self._show is not None
        return intake_of(batches, self._prepared.feed, group, keeps=keeps)

    def _run_pass(self, intake: Intake | RowIntake) -> None:
        calls, metrics, watch = self._probing.calls(self._prepared), self._metrics, self._watch
        standing, clock, interrupts, show = self.standing, self._watch.clock, self._interrupts, self._show
        position = standing.position
        more = self._begin_pass(intake)
        run, take, look = stepping(calls, intake, standing)
        due, alarm, meeting = self._due(), self._alarm(), self._meetings.next_step
        watch.turn("step")
        # Two looks at the clock a call are all that the steps pay for knowing how long they waited for data.
        waited, asked = 0.0, clock()
        while more:
            feds = take(calls.room(due - standing.step), calls.takes)
            waited += clock() - asked
            try:
                standing.raw, metrics.packed = run(standing.raw, metrics.packed, feds)
            except Exception as error:
                self._failures.note(standing.step + 1, feds, error, self._supply)
                raise
            if show is not None:
                show(intake.taken)
            asked = clock()
            standing.count(feds)
            self._pass_begun = True
            if standing.step >= due:
                intake.mark(position.batch)
            # Looking one batch ahead tells whether this was the last step of the pass, and overlaps the step.
            try:
                more = look()
            except Exception:
                if standing.step >= due:
                    self._at_step(pass_done=False)  # the step was done, and what is due after it is told
                raise
            rung = alarm < NEVER and clock() >= alarm
            if standing.step >= due or not more or rung or standing.step >= meeting or interrupts.asked:
                if not more:
                    position.batch = 0
                calls.pause()
                watch.move(waited + clock() - asked, "data")
                watch.turn("callbacks")
                self._at_step(pass_done=not more)
                watch.turn("step")
                if self._finished():
                    break
                run, take, look = stepping(calls, intake, standing)
                due, alarm, meeting = self._due(), self._alarm(), self._meetings.next_step
                waited, asked = 0.0, clock()
                if more:
                    if self._hold():
                        self._prepared.calls.open(standing.raw, metrics.packed, intake.first())
                    calls.resume()
        watch.turn("other")

    def _begin_pass(self, intake: Intake | RowIntake) -> bool:
        """Gets ready for the steps of a pass; there is a batch to begin with."""
        with self._watch.on("data"):
            more = intake.more()
            if not more:
                raise ValueError(
                    f"the training source gave no batch in epoch {self.standing.position.epoch}. It must give "
                    "batches for every epoch; an iterator that is used up can be wrapped in a function that opens "
                    "a new one."
                )
            first = intake.first()
        with self._watch.on("compile"):
            self._engine.wait_for("training")
        self._hold()
        self._prepared.calls.open(self.standing.raw, self._metrics.packed, first)
        return more

    def _hold(self) -> bool:
        """Has the next steps train the parameters that are released by now; says whether others than before."""
        stages = self._engine.stages
        return stages is not None and self._prepared.calls.hold(
            self._engine.held(self._data, self.standing.step)
        )

    def _due(self) -> float:
        """Returns the next step at which the host has anything to do."""
        end = NEVER if self.standing.plan.steps is None else self.standing.plan.steps
        timetables = self._steppers, self._evaluations, self._chores, self._probing
        return min(end, *[one.next_step for one in timetables])

    def _alarm(self) -> float:
        """Returns the next time on the clock at which the host has anything to do."""
        if self._together:
            return NEVER  # processes look at the time where they meet, all at the same step
        return self._started + min(self._steppers.next_time, self._evaluations.next_time)

    def _at_step(self, *, pass_done: bool) -> None:
        epoch = self.standing.position.epoch if pass_done else None
        for chore in self._chores.take_due(self.standing.step, epoch, 0.0):
            chore.run()
        if self.standing.step >= self._meetings.next_step:
            self._meet()
        self._stop_if_interrupted()
        now = self._seconds()
        steppers = self._steppers.take_due(self.standing.step, epoch, now)
        evaluations = self._evaluations.take_due(self.standing.step, epoch, now)
        if self._request.dry and self._over():  # everything is tried once, however far it is off
            steppers, evaluations = self._steppers.things, self._evaluations.things
        steppers = self._probing.told(steppers)
        if self._together and steppers:
            # Here on all processes, in case a callback looks at its metrics on one of them only.
            self._metrics.cut()
        self._dispatch.call_each("on_step", guards(steppers))
        if self.standing.rollback is None:
            self._dispatch.call_each("on_step", before_checkpoints(steppers))
            # Told nothing else, a fit that ends inside a pass is evaluated where it ends.
            stopped = self.standing.stopped_by is not None and not self._interrupted
            ending = self._request.eval_every is None and (stopped or self._over())
            self.standing.evaluation_owed = bool(self._request.evaluations) and (bool(evaluations) or ending)
            self.standing.epoch_end_owed = pass_done
            self._settle()
        if self.standing.rollback is not None:
            self._roll_back()
            return
        self._dispatch.call_each("on_step", checkpoints(steppers))
        self._stop_if_interrupted()  # a signal that came meanwhile: what was due is done, and can be saved
        self._save()

    def _settle(self) -> None:
        """Evaluates and ends the pass, where that is due and until a signal comes."""
        if self.standing.evaluation_owed and not self._interrupted:
            self.standing.evaluation_owed = not self._evaluate()
        if self.standing.epoch_end_owed and not self._interrupted and self.standing.rollback is None:
            self.standing.epoch_end_owed = False
            self._end_pass()

    def _stop_if_interrupted(self) -> None:
        if self._interrupts.received is not None:
            self.standing.stopped_by = self.standing.stopped_by or self._interrupts.received

    # Evaluation -----------------------------------------------------------------------------------------------

    def _evaluate(self) -> bool:
        """Evaluates, and says whether that was done to the end."""
        self._dispatch.call("on_eval_start")
        if self.standing.rollback is not None:
            return False
        with self._watch.on("eval"):
            metrics = self._looks.metrics()
        if metrics is None:
            self._stop_if_interrupted()
            return False
        self._told.evaluation = read_only(metrics)
        self._dispatch.call("on_eval_end")
        self._told.evaluation = NO_METRICS
        return True

    def _wait_for(self, tree: PyTree) -> None:
        wait_for(self._watch, tree)

    # Saving and going back ------------------------------------------------------------------------------------

    def _save(self, *, everyone: bool = False) -> None:
        asked = self._interrupts.take_save()
        keepers = self._saving.due(everyone=everyone or asked or self._finished())
        if self._finished():
            self._looks.weights.settle()  # the last checkpoint is to hold them
        if asked and not keepers:
            self._saving.say_there_is_none()
        if keepers:
            self._dispatch.call("on_save")
        if self.standing.rollback is not None:
            self._roll_back()
            return
        if keepers:
            place = self._intake.place(self.standing.position.batch)
            self._wait_for(self.standing.raw)  # what is saved is read at once
            with self._watch.on("save"):
                self._saving.save(keepers, place, interrupted=self._interrupted)

    def _roll_back(self) -> None:
        with self._watch.on("save"):
            self._saving.roll_back()
        self._make_timetables()
        self._failures.begin(self.standing.step, self.standing.position)
