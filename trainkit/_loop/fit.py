"""One fit from its request to its result: what is opened around it, and the state it begins with.

Owns the way in and out; what happens in between is the loop's.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

from trainkit._core.state import TrainState
from trainkit._core.tree import copy_arrays
from trainkit._core.typing import Batch
from trainkit._engine.compile_ahead import compile_ahead
from trainkit._engine.compile_cache import kept_on_disk
from trainkit._engine.cpu_settings import arena_is_shared
from trainkit._engine.engine import Engine
from trainkit._feed.leaves import parted
from trainkit._feed.stream import Stream
from trainkit._loop.folder import holding_folder, settle
from trainkit._loop.interrupts import Interrupts
from trainkit._loop.loop import Loop
from trainkit._loop.request import Request
from trainkit._loop.result import FitResult, summarized
from trainkit._loop.run import Ongoing, Run
from trainkit._loop.standing import goes_beyond
from trainkit._loop.stopwatch import PARTS
from trainkit._loop.told import direction_of
from trainkit._resume.restore import restore_state
from trainkit._resume.saved import Saved
from trainkit._step.given import check_frozen_same
from trainkit.data._base import Source
from trainkit.data._batch import GlobalBatch
from trainkit.writers._open import FitWriter, open_writers


def fit(engine: Engine, run: Run, request: Request) -> FitResult:
    """Trains as `request` says and returns what came of it; `run` then stands where that ended.

    Of a dry run nothing is kept but what the trainer holds.

    Args:
        engine: of the trainer.
        run: its run.
        request: what the fit was asked.
    """
    interrupts = Interrupts(alone=engine.strategy.processes == 1)
    # The logs first: a folder that can't be written to is refused before anything compiles.
    with (
        run.fitting() as ongoing,
        ongoing.watch.noting_compilation(),
        interrupts.listening(),
        holding_folder(run, request),
        open_writers(request.logdir, request.writers, run.history) as writer,
        kept_on_disk(request.keep_compiled, processes=engine.strategy.processes),
    ):
        result = _fit(engine, run, request, writer, interrupts, ongoing)
    # A signal that came when there was nothing left to break off is not swallowed.
    return dataclasses.replace(result, stopped_by=result.stopped_by or interrupts.received)


def _fit(
    engine: Engine,
    run: Run,
    request: Request,
    writer: FitWriter,
    interrupts: Interrupts,
    ongoing: Ongoing,
) -> FitResult:
    fresh = not (run.has_folder or run.behind)
    found = run.find(request.stores, writer)
    saved = None if found is None else found[1]
    first, batches = peek(engine, request.source, run)
    if found is not None:
        current = run.state or engine.init_spec(first)
        run.state, run.shown = restore_state(engine, found[0], found[1].step, current), False
    if saved is not None and saved.fit > request.fit:
        settle(run, request)
        run.begin(saved)
        return _done_before(engine, run, saved)
    if saved is not None:
        check_frozen_same(saved.frozen, engine.steps.constants.fingerprint(engine.strategy))
    if saved is None:
        run.take_back(writer)
    elif goes_beyond(request, saved):
        # It goes on from the step that it went back to: what was logged after that is taken back first.
        run.take_back(writer)
        saved = dataclasses.replace(saved, history=run.history.state_dict())
    run.adopt(request.callbacks)
    loop = Loop(
        engine,
        request,
        state=_state_to_train(engine, run, request, first),
        first=first,
        batches=batches,
        position=run.position,
        writer=writer,
        history=run.history,
        interrupts=interrupts,
        watch=ongoing.watch,
        resumed=saved,
    )
    settle(run, request)
    run.begin(saved)
    ongoing.standing = loop.standing
    try:
        if fresh and saved is None and writer.logs is not None and request.card is not None:
            writer.logs.write_texts(loop.standing.step, {"run": request.card()})
        return loop.run()
    finally:
        run.state, run.shown = loop.standing.state, True
        run.put_down(loop.unread)
        run.behind = loop.standing.came_to is not None


def _done_before(engine: Engine, run: Run, saved: Saved) -> FitResult:
    """Returns the result of a fit after which the run was in a later one when it ended."""
    assert run.state is not None
    run.shown = True
    return FitResult(
        state=run.state,
        step=saved.step,
        epoch=saved.epoch,
        seconds=0.0,
        stopped_by=None,
        history=run.history,
        metrics=summarized(run.history, functools.partial(direction_of, engine.training_metrics())),
        timing=dict.fromkeys(PARTS, 0.0),
    )


def _state_to_train(engine: Engine, run: Run, request: Request, first: Batch | GlobalBatch) -> TrainState:
    if run.state is None:
        one_device = engine.strategy.takes_host_batches and not isinstance(first, GlobalBatch)
        # Threads that compile stand in each other's way where they share one arena of the allocator.
        if one_device and request.accumulate == 1 and not arena_is_shared():
            rows = request.source.batch_size or 0
            compile_ahead(engine, request.source, first, rows, request.evaluations)
        run.state, run.shown = engine.init(request.seed, first), False
    # The step takes the buffers of its state: what the user may still hold is left whole.
    state = copy_arrays(run.state) if run.shown else run.state
    return engine.complete(state, request.seed)


def first_spec(source: Source) -> Any:
    """Returns a batch of a training source, or its shapes and dtypes; None where to look at one would cost the fit."""
    batch = next(iter(source.global_batches(0)), None) if source.seekable else None
    return None if batch is None else parted(batch.spec())[0]


def peek(engine: Engine, source: Source, run: Run) -> tuple[Any, Iterator[Any]]:
    """Returns the first batch from where the run stands in its data, and the iterator over it and the others."""
    position, placed = run.position, run.place is not None
    batches = run.open(engine, source)
    first = next(batches, None)
    if first is None and (position.batch or placed):
        # It was saved behind the last batch, which only the end of the data tells.
        position.batch = 0
        run.put_down(None)
        return peek(engine, source, run)
    if first is None:
        raise ValueError("the training source is empty: it gave no batch. Give data with at least one.")
    if not isinstance(batches, Stream):
        return first, itertools.chain([first], batches)
    batches.put_back(first)
    return first, batches
