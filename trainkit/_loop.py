"""One fit: the order of everything that happens in it, and nothing else.

The step runs alone between two steps at which host code is due; `_due` knows the next one. Order at such a
step: `on_step` (writers, then monitors), the evaluation with its hooks, `on_step` of checkpoints, `on_epoch_end`.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from trainkit._agreement import agree
from trainkit._choice import Choice
from trainkit._dispatch import Dispatcher, before_checkpoints, checkpoints
from trainkit._engine import Engine, key_impl
from trainkit._evaluate import evaluate
from trainkit._feed import Fed, Intake
from trainkit._history import History
from trainkit._interrupts import Interrupts
from trainkit._result import FitResult
from trainkit._state import TrainState
from trainkit._step import with_raw_key, with_typed_key
from trainkit._tree import differences, is_key, signature
from trainkit._typing import Batch
from trainkit._when import NEVER, Cadence, Every
from trainkit._windows import NO_METRICS, Reader, TrainMetrics
from trainkit.callbacks._callback import Callback, Stop, Update
from trainkit.callbacks._info import Info, Plan
from trainkit.data._batch import check_batch
from trainkit.data._source import Source
from trainkit.metrics._accumulator import Accumulator
from trainkit.writers._attributed import Attributed, Ledger
from trainkit.writers._writer import MetricWriter

# Carried float32 sums and int32 counts are handed to the host at least this often, and merged there in float64.
_SEGMENT = Every(steps=512)
# How often several processes agree on the time and on signals: each time costs a round trip.
_MEETING = Every(steps=32)


@dataclasses.dataclass
class Position:
    """Where a trainer stands in its data: kept between fits.

    Attributes:
        epoch: passes over the training source begun.
        batch: batches of the running pass already used; 0 between passes.
    """

    epoch: int = 0
    batch: int = 0


@dataclasses.dataclass(frozen=True)
class Request:
    """What one fit was asked to do; exactly one of `epochs` and `steps` is given."""

    source: Source
    epochs: int | None
    steps: int | None
    evaluations: Mapping[str, Source]
    eval_every: Cadence | None
    accumulate: int
    callbacks: tuple[Callback, ...]
    logdir: pathlib.Path | None


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
        choice: Choice | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._raw, self._impl, self.position = with_raw_key(state), key_impl(state), position
        self.stopped_by: str | None = None
        self._engine, self._request, self._history, self._clock = engine, request, history, clock
        self._interrupts = interrupts
        self._batches: Iterator[Batch] | None = itertools.chain([first], batches)
        self._prepared = engine.prepare_train(state, request.source, first)
        self._step = int(state.step)
        self._plan = self._make_plan()
        self._prepared.calls.begin(choice, self._plan.steps and self._plan.steps - self._step)
        self._metrics = TrainMetrics(self._prepared.accumulator, self._prepared.empty)
        ledger = Ledger()
        self._writers = {
            id(callback): Attributed(writer, owner, ledger)
            for callback, owner in zip(request.callbacks, _owners(request.callbacks), strict=True)
        }
        self._readers: dict[int, Reader] = {id(c): self._metrics.reader() for c in request.callbacks}
        self._epoch_reader = self._metrics.reader()
        self._eval_metrics: Mapping[str, Any] = NO_METRICS
        self._epoch_metrics: Mapping[str, Any] = NO_METRICS
        self._started, self._agreed_seconds = clock(), 0.0
        self._together = engine.strategy.processes > 1
        self._dispatch = Dispatcher(request.callbacks, self._info, self._act)
        self._steppers = _Timetable(self._dispatch.implementing("on_step"), self._step)
        evaluation = _Chore(request.eval_every or Every(epochs=1), self._evaluate)
        self._evaluations = _Timetable([evaluation] if request.evaluations else [], self._step)
        self._chores = _Timetable(self._make_chores(), self._step)

    @property
    def state(self) -> TrainState:
        """The train state after the last step."""
        return with_typed_key(self._raw, self._impl)

    @property
    def choice(self) -> Choice | None:
        """How steps are put into calls; None while that is being measured.

        Given to the loop that goes on from here, it makes the same calls as this one would.
        """
        return self._prepared.calls.choice

    # One fit --------------------------------------------------------------------------------------------------

    def run(self) -> FitResult:
        """Runs to the end, to a stop, or to the first exception, which is raised after everything is closed."""
        error: BaseException | None = None
        try:
            self._dispatch.start()
            while not self._finished():
                self._epoch()
            self._dispatch.call("on_fit_end")
        except BaseException as exc:
            error = exc
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
            stopped_by=self.stopped_by,
            history=self._history,
        )

    def _make_plan(self) -> Plan:
        request, per_epoch = self._request, self._request.source.steps_per_epoch
        first_epoch = self.position.epoch - (1 if self.position.batch else 0)
        last_epoch = None if request.epochs is None else first_epoch + request.epochs
        steps = self._step + request.steps if request.steps is not None else None
        if per_epoch is not None:
            # The pass begun first, then whole ones; a tail shorter than `accumulate` is one update.
            left = -(-(per_epoch - self.position.batch) // request.accumulate)
            per_epoch = -(-per_epoch // request.accumulate)
            if request.epochs is not None:
                steps = self._step + left + (request.epochs - 1) * per_epoch
        return Plan(self._step, steps, last_epoch, per_epoch, tuple(request.evaluations))

    def _make_chores(self) -> list["_Chore"]:
        chores = [_Chore(_SEGMENT, self._metrics.cut)]
        ahead = self._engine.strategy.in_flight
        if ahead:
            chores.append(_Chore(Every(steps=ahead), lambda: jax.block_until_ready(self._metrics.packed)))
        if self._together:
            chores.append(_Chore(_MEETING, self._meet))
        return chores

    def _meet(self) -> None:
        seconds = self._clock() - self._started
        self._agreed_seconds, self._interrupts.received = agree(seconds, self._interrupts.noted)

    def _seconds(self) -> float:
        """Returns the seconds since the fit began, the same on every process."""
        return self._agreed_seconds if self._together else self._clock() - self._started

    def _finished(self) -> bool:
        plan = self._plan
        if self.stopped_by is not None:
            return True
        if self._request.steps is not None:
            return plan.steps is not None and self._step >= plan.steps
        return plan.epochs is not None and self.position.epoch >= plan.epochs and self.position.batch == 0

    # One pass over the data -----------------------------------------------------------------------------------

    def _epoch(self) -> None:
        begins, first_step = self.position.batch == 0, self._step
        if begins:
            self.position.epoch += 1
        try:
            batches = self._open_pass()
            self._dispatch.call("on_epoch_start")
            self._epoch_reader.take()
            if self.stopped_by is None:
                self._run_pass(batches)
            self._metrics.cut()
            self._epoch_metrics = self._epoch_reader.take()
            self._dispatch.call("on_epoch_end")
            self._epoch_metrics = NO_METRICS
        finally:
            # Broken off before its first step, a pass was not begun: the next fit goes on with it.
            if begins and self._step == first_step:
                self.position.epoch -= 1

    def _open_pass(self) -> Iterator[Batch]:
        batches, self._batches = self._batches, None
        if batches is None:
            batches = self._engine.batches(self._request.source, self.position.epoch - 1, self.position.batch)
        return batches

    def _run_pass(self, batches: Iterator[Any]) -> None:
        feed, calls, metrics = self._prepared.feed, self._prepared.calls, self._metrics
        place: Callable[[Any], Fed] = feed.place
        if self._request.accumulate > 1:
            batches, place = _grouped(batches, self._request.accumulate), feed.place_group
        intake = Intake(batches, place)
        more = intake.more()
        if not more:
            raise ValueError(
                f"the training source gave no batch in epoch {self.position.epoch}. It must give batches for every "
                "epoch; an iterator that is used up can be wrapped in a function that opens a new one."
            )
        calls.open(self._raw, metrics.packed, intake.first())
        due, alarm, interrupts = self._due(), self._alarm(), self._interrupts
        while more:
            feds = intake.take(calls.room(due - self._step), calls.takes)
            try:
                self._raw, metrics.packed = calls(self._raw, metrics.packed, feds)
            except TypeError:
                for fed in feds:
                    check_batch(fed.batch)  # names the leaf that no step can take, where that was the reason
                raise
            self._step += len(feds)
            self.position.batch += sum([fed.batches for fed in feds])
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
        self._dispatch.call_each("on_step", before_checkpoints(steppers))
        # Told nothing else, a fit that ends inside a pass is evaluated where it ends.
        ending = self._request.eval_every is None and self._finished()
        if self._request.evaluations and (evaluations or ending) and self._interrupts.received is None:
            self._evaluate()
        self._dispatch.call_each("on_step", checkpoints(steppers))

    def _stop_if_interrupted(self) -> None:
        if self._interrupts.received is not None:
            self.stopped_by = self.stopped_by or self._interrupts.received

    # Evaluation -----------------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        self._dispatch.call("on_eval_start")
        state = self._engine.averaged(self.state)
        metrics: dict[str, Any] = {}
        for name, source in self._request.evaluations.items():
            values = evaluate(self._engine, state, source, lambda: self._interrupts.received is not None)
            if values is None:
                self._stop_if_interrupted()
                return
            metrics |= {f"{name}/{metric}": value for metric, value in values.items()}
        self._eval_metrics = metrics
        self._dispatch.call("on_eval_end")
        self._eval_metrics = NO_METRICS

    # What callbacks are told, and what they ask for -----------------------------------------------------------

    def _info(self, callback: Callback, hook: str) -> Info:
        return Info(
            step=self._step,
            epoch=self.position.epoch,
            state=lambda: self.state,
            metrics=functools.cache(functools.partial(self._metrics_for, callback, hook)),
            history=self._history,
            logdir=self._request.logdir,
            writer=self._writers[id(callback)],
            plan=self._plan,
            seconds=self._clock() - self._started,
            direction=functools.partial(direction_of, self._prepared.accumulator),
        )

    def _metrics_for(self, callback: Callback, hook: str) -> Mapping[str, Any]:
        if hook in ("on_step", "on_fit_end", "on_exception"):
            self._metrics.cut()
            return self._readers[id(callback)].take()
        if hook == "on_eval_end":
            return self._eval_metrics
        return self._epoch_metrics

    def _act(self, callback: Callback, action: Stop | Update) -> None:
        if isinstance(action, Stop):
            self.stopped_by = self.stopped_by or action.reason
            return
        old = self.state
        new = action.fn(old)
        changed = differences(signature(old), signature(new))
        if changed:
            raise ValueError(
                f"{type(callback).__name__} returned an Update that changes the structure of the state: "
                f"{'; '.join(changed)}. Keep structure, shapes and dtypes, so that the step need not compile again."
            )
        # Own buffers, strong types, the layout of the state: the next step donates them and must not compile anew.
        own = jax.tree.map(_own, new, old)
        self._raw = with_raw_key(self._engine.strategy.lay_out(own))


def _owners(callbacks: Sequence[Callback]) -> list[str]:
    """Returns a name for each callback in messages about what it writes; its place tells apart those of one class."""
    classes = [type(callback).__name__ for callback in callbacks]
    return [
        name if classes.count(name) == 1 else f"{name} (number {index} of the callbacks)"
        for index, name in enumerate(classes, start=1)
    ]


def _grouped(batches: Iterator[Batch], size: int) -> Iterator[tuple[Batch, ...]]:
    while group := tuple(itertools.islice(batches, size)):
        yield group


def _own(new: Any, old: Any) -> Any:
    strong = new if is_key(old) else jnp.asarray(new, old.dtype)
    return jax.device_put(strong, may_alias=False)


def direction_of(accumulator: Accumulator, name: str) -> str | None:
    """Returns "min" or "max" for a full metric name such as `eval/accuracy`, None where nothing is registered."""
    return accumulator.direction(name.rsplit("/", 1)[-1])


@dataclasses.dataclass(frozen=True)
class _Chore:
    """Something the loop itself does at a cadence."""

    every: Cadence
    run: Callable[[], Any]


class _Timetable:
    """When each of several things with a cadence `every` is due next."""

    def __init__(self, things: list[Any], step: int) -> None:
        self._things = things
        self._steps = [thing.every.next_step(step) for thing in things]
        self._times = [thing.every.seconds or math.inf for thing in things]

    @property
    def next_step(self) -> float:
        """The next step at which something is due by steps."""
        return min(self._steps, default=NEVER)

    @property
    def next_time(self) -> float:
        """The next time, in seconds into the fit, at which something is due."""
        return min(self._times, default=NEVER)

    def take_due(self, step: int, epoch: int | None, now: float) -> list[Any]:
        """Returns what is due after `step`, which completed `epoch` (None: none), `now` seconds into the fit."""
        due = []
        for index, thing in enumerate(self._things):
            every = thing.every
            by_step, by_time = step >= self._steps[index], now >= self._times[index]
            if by_step:
                self._steps[index] = every.next_step(step)
            if by_time:
                self._times[index] = now + (every.seconds or math.inf)
            if by_step or by_time or (epoch is not None and every.due_epoch(epoch)):
                due.append(thing)
        return due
