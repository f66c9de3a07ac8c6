"""Evaluation and prediction over one source: exact, without waiting between batches.

Owns the two passes; not when they happen.
"""

import collections
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from trainkit._core.state import TrainState, with_raw_key
from trainkit._core.tree import describe, named_leaves
from trainkit._core.typing import PyTree
from trainkit._engine.engine import Engine
from trainkit._feed.leaves import Parted, with_host
from trainkit.data._batch import unpad
from trainkit.data._source import Source

# Carried float32 sums and int32 counts are handed to the host this often, where they are merged in float64.
_STEPS_PER_SEGMENT = 512
# Batches whose outputs may wait on the devices before they are fetched.
_FETCH_BEHIND = 4


def evaluate(
    engine: Engine,
    state: TrainState,
    source: Source,
    interrupted: Callable[[int, PyTree], bool] = lambda batches, running: False,
    wait: Callable[[PyTree], None] | None = None,
) -> dict[str, Any] | None:
    """Returns the metrics of `state` over one pass of `source`, floats or NumPy arrays by name.

    It is None where `interrupted`, given how many calls were made and what the last one returns, said so. `wait` is
    given the state before anything waits for the devices, so that it can be told from the evaluation how long the steps
    before took.

    Raises:
        ValueError: the source is empty.
        RuntimeError: the examples counted on the devices are not those the source gave.
    """
    source = source.in_order()
    first, batches, host = peek(engine, source)
    prepared = engine.prepare_eval(state, source, first)
    state = with_raw_key(engine.evaluated(state))
    accumulator, feed, rows = prepared.accumulator, prepared.feed, Fetching(engine)
    feed.on_padding = functools.partial(engine.padding.evaluation, prepared, state)
    collects, in_flight = accumulator.has_collecting, feed.in_flight
    carry, segments, carried, given = prepared.empty, [], 0, 0
    beside: list[dict[str, np.ndarray]] = []
    for number, batch in enumerate(prepared.batches or batches, start=1):
        if interrupted(number - 1, carry):
            return None
        fed = feed.place(batch)
        carry, collected = prepared.step(state, carry, fed.batch, fed.mask)
        given += fed.real
        carried += fed.batches
        if collects:
            rows.add(collected, None if engine.steps.units else fed.real)
            beside.append({name: leaf for name, leaf in host().items() if leaf.ndim})
        if carried >= _STEPS_PER_SEGMENT:
            segments.append(carry)
            carry, carried = prepared.empty, 0
        if in_flight and number % in_flight == 0:
            if wait is not None and number == in_flight:
                wait(state)
            jax.block_until_ready(carry)
    feed.on_padding = None  # it holds the state
    if wait is not None:
        wait(state)
    segments = [engine.strategy.fetch(segment) for segment in [*segments, carry]]
    _check_count(sum(int(counted) for _, counted in segments), given, source)
    merged = accumulator.merge([packed for packed, _ in segments])
    collected = [{**one, **more} for one, more in zip(rows.all(), beside, strict=True)]
    return accumulator.compute(merged, collected)


def predict(engine: Engine, state: TrainState, source: Source) -> PyTree:
    """Returns what `predict_step` gives for every example of `source`, in its order, as NumPy arrays.

    Where a batch is one unit it is a list of what it gives for each.

    Raises:
        ValueError: the source is empty, or an output has not one row per example.
    """
    first, batches, host = peek(engine, source.in_order())
    step, feed = engine.prepare_predict(state, first)
    state = with_raw_key(state)
    rows, beside = Fetching(engine), []
    for batch in batches:
        beside.append(host())
        fed = feed.place(batch)
        outputs = step(state, fed.batch, fed.mask)
        if engine.steps.units:
            rows.add(outputs, None)
            continue
        check_rows(outputs, fed.real if fed.mask is None else fed.mask.shape[0])
        rows.add(outputs, fed.real)
    if engine.steps.units:
        return rows.all()
    predicted = jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows.all())
    names = [name for name, leaf in beside[0].items() if leaf.ndim]
    return with_host(predicted, {name: np.concatenate([one[name] for one in beside]) for name in names})


class Fetching:
    """Outputs fetched a few batches behind the devices, cut to the real rows where there are rows."""

    def __init__(self, engine: Engine) -> None:
        self._fetch = engine.strategy.fetch
        self._waiting: collections.deque[tuple[PyTree, int | None]] = collections.deque()
        self._done: list[PyTree] = []

    def add(self, outputs: PyTree, real: int | None) -> None:
        """Takes the outputs of one batch, with its number of real rows; None where they have no rows."""
        self._waiting.append((outputs, real))
        if len(self._waiting) > _FETCH_BEHIND:
            self._fetch_one()

    def take(self) -> list[PyTree]:
        """Returns what was fetched since this was last called."""
        done, self._done = self._done, []
        return done

    def all(self) -> list[PyTree]:
        """Returns what is left, after waiting for it."""
        while self._waiting:
            self._fetch_one()
        return self._done

    def _fetch_one(self) -> None:
        outputs, real = self._waiting.popleft()
        fetched = self._fetch(outputs)
        self._done.append(fetched if real is None else unpad(fetched, real))


def peek(engine: Engine, source: Source) -> tuple[Any, Iterator[Any], Callable[[], dict[str, np.ndarray]]]:
    """Returns the first batch, all batches, and what stays on the host of the one handed out last."""
    if source.endless:
        raise ValueError("the source has no end. Cut it: tk.data.take(data, batches).")
    batches, host = open_pass(engine, source, 0)
    first = next(batches, None)
    if first is None:
        raise ValueError("the source is empty: it gave no batch. Give at least one, or leave eval_data out.")
    return first, itertools.chain([first], batches), host


def open_pass(
    engine: Engine, source: Source, start: int
) -> tuple[Iterator[Any], Callable[[], dict[str, np.ndarray]]]:
    """Returns the batches from one of them on, and what stays on the host of the one handed out last."""
    batches = engine.batches(source, 0, start)
    return batches, (lambda: batches.host) if isinstance(batches, Parted) else dict


def _check_count(counted: int, given: int, source: Source) -> None:
    expected = given if source.num_examples is None else source.num_examples
    if not counted == given == expected:
        raise RuntimeError(
            f"evaluation counted {counted} examples, was given {given} and the source has {expected}. The metrics "
            "would be wrong; if eval_step changes the mask or the source its size, make them agree."
        )


def check_rows(outputs: PyTree, rows: int) -> None:
    for name, leaf in named_leaves(outputs):
        if not leaf.shape or leaf.shape[0] != rows:
            raise ValueError(
                f"predict_step returned {name} as {describe(leaf)} for a batch of {rows}; every output must have "
                "one row per example."
            )
