"""Programs compiled before they are needed, from shapes alone, while the state is initialised.

Owns the order of that work; not the programs. What a jitted function compiled for some shapes is found again by
its calls, so nothing is handed over.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from trainkit._core.state import with_raw_key
from trainkit._engine.engine import Engine
from trainkit._engine.prepared import Prepared
from trainkit.data._source import Source


def compile_ahead(
    engine: Engine, source: Source, first: Any, rows: int, evaluations: Mapping[str, Source]
) -> None:
    """Begins to compile the training step, then the evaluations, for a state that is yet to be initialised.

    Args:
        engine: whose programs they are; before it hands one out it waits for that.
        source: the training data.
        first: its first batch.
        rows: of a full batch.
        evaluations: the evaluation data; those that can't be read from anywhere are left alone.
    """
    state = engine.init_spec(first)
    supply = engine.supply(source)
    prepared = engine.prepare_train(state, source, first, rows)
    jobs = [_job(prepared, state, supply.like(first), engine.held(supply.held, 0))]
    for evaluation in evaluations.values():
        batch = next(engine.batches(evaluation, 0), None) if evaluation.seekable else None
        if batch is not None:
            prepared = engine.prepare_eval(state, evaluation, batch)
            jobs.append(_job(prepared, engine.evaluated(state), batch))
    done = [threading.Event() for _ in jobs]
    engine.expect(training=done[0], evaluation=done[-1])

    def work() -> None:
        # One after the other: the first step is not to wait for a program that is needed later.
        for job, event in zip(jobs, done, strict=True):
            # What goes wrong is told by the call that needs the program.
            with contextlib.suppress(Exception):
                job()
            event.set()

    threading.Thread(target=work, name="trainkit-compile").start()


def _job(prepared: Prepared, state: Any, batch: Any, *held: Any) -> Callable[[], Any]:
    fed = prepared.feed.place(batch)
    step: Any = prepared.step
    raw = jax.eval_shape(with_raw_key, state)

    def job() -> None:
        begun = time.perf_counter()
        step.lower(raw, prepared.empty, *held, fed.batch, fed.mask).compile()
        prepared.calls.compiled_in = time.perf_counter() - begun

    return job
