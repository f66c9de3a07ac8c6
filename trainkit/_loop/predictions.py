"""Predictions larger than memory: written as they come, and gone on with where they were broken off.

Owns the pass, and what tells one prediction from another; not the files.
"""

import collections
import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from trainkit._core.state import TrainState, with_raw_key
from trainkit._core.tree import is_key, named_leaves
from trainkit._core.typing import PyTree
from trainkit._engine.engine import Engine
from trainkit._feed.leaves import with_host
from trainkit._loop.evaluate import Fetching, check_rows, open_pass, peek
from trainkit._loop.npy_files import NpyFiles
from trainkit._loop.npy_leaf import Leaf
from trainkit._step.checks import explained_errors
from trainkit.data._source import Source

_ROOT = "output"
"""Name of the file where a prediction is one array."""


def predict_into(engine: Engine, state: TrainState, source: Source, folder: str | os.PathLike[str]) -> PyTree:
    """Returns what `evaluate.predict` does, as memory maps of files in `folder`; see `Trainer.predict`."""
    _refuse_others(engine)
    source = source.in_order()
    first, batches, host = peek(engine, source)
    step, feed = engine.prepare_predict(state, first)
    raw, fed = with_raw_key(state), feed.place(first)
    with explained_errors():
        program, spec = jax.make_jaxpr(step, return_shape=True)(raw, fed.batch, fed.mask)
    check_rows(spec, fed.real if fed.mask is None else fed.mask.shape[0])
    beside = {name: _plain(name, leaf) for name, leaf in host().items() if leaf.ndim}
    leaves = [
        *(
            Leaf(_named(name), np.dtype(leaf.dtype), tuple(leaf.shape[1:]))
            for name, leaf in named_leaves(spec)
        ),
        *(Leaf(name, leaf.dtype, leaf.shape[1:]) for name, leaf in beside.items()),
    ]
    if not leaves:
        raise ValueError(
            "predict_step gives no array, so there is nothing to write: return outputs from loss, or override it."
        )
    made_for = {
        "weights": _digest_of_state(state),
        "program": _digest_of_program(program),
        "data": source.facts(),
        "first batch": _digest([*named_leaves(first), *sorted(host().items())]),
    }
    files = NpyFiles(
        pathlib.Path(folder), json.loads(json.dumps(made_for, sort_keys=True, default=str)), leaves
    )
    try:
        known = source.num_examples is not None or source.steps_per_epoch is not None
        if not (files.complete and known):
            rest, host = _after(engine, source, batches, host, files.batches)
            _write(engine, files, rest, host, lambda batch: _run(step, feed, raw, batch), list(beside))
        arrays = files.finish()
    finally:
        files.close()
    predicted = [arrays[_named(name)] for name, _ in named_leaves(spec)]
    return with_host(
        jax.tree.unflatten(jax.tree.structure(spec), predicted), {name: arrays[name] for name in beside}
    )


def _refuse_others(engine: Engine) -> None:
    if engine.steps.units:
        raise ValueError(
            "predict(out=...) writes rows, and a batch that is one unit (batch_axis = None) has none: leave out= away."
        )
    if engine.strategy.processes > 1:
        raise ValueError("predict(out=...) is for one process: leave out= away, or predict in one process.")


def _run(step: Callable[..., Any], feed: Any, raw: TrainState, batch: Any) -> tuple[PyTree, int]:
    fed = feed.place(batch)
    return step(raw, fed.batch, fed.mask), fed.real


def _write(
    engine: Engine,
    files: NpyFiles,
    batches: Iterator[Any],
    host: Callable[[], Mapping[str, np.ndarray]],
    run: Callable[[Any], tuple[PyTree, int]],
    beside: list[str],
) -> None:
    fetching, waiting = Fetching(engine), collections.deque[list[np.ndarray]]()

    def write(fetched: list[PyTree]) -> None:
        for outputs in fetched:
            files.write([*map(np.asarray, jax.tree.leaves(outputs)), *waiting.popleft()])

    while True:
        try:
            batch = next(batches, None)
        except BaseException:
            write(fetching.all())  # what is computed is kept
            raise
        if batch is None:
            break
        there = host()
        waiting.append([_plain(name, there[name]) for name in beside])
        fetching.add(*run(batch))
        write(fetching.take())
    write(fetching.all())


def _after(
    engine: Engine, source: Source, batches: Iterator[Any], host: Callable[[], Any], done: int
) -> tuple[Iterator[Any], Callable[[], Any]]:
    """Returns the batches after the first `done`, and what stays on the host of the one handed out last."""
    if not done:
        return batches, host
    if source.seekable:
        return open_pass(engine, source, done)
    passed = sum(1 for _ in itertools.islice(batches, done))
    if passed < done:
        raise ValueError(
            f"out= holds the predictions for {done} batches, and the data ended after {passed}: they are other data. "
            "Give another folder."
        )
    return batches, host


def _named(name: str) -> str:
    return _ROOT if name == "(root)" else name


def _plain(name: str, leaf: np.ndarray) -> np.ndarray:
    """Returns what stays on the host as a file can hold it: strings of a fixed width, no objects."""
    if leaf.dtype.kind != "O":
        return leaf
    for kind in (str, bytes):
        if all(isinstance(one, kind) for one in leaf.flat):
            return leaf.astype(kind)
    found = next(type(one).__name__ for one in leaf.flat if not isinstance(one, str))
    raise TypeError(
        f"the leaf {name!r} of a batch holds objects ({found}), which predict(out=...) can't write: give strings or "
        "numbers, leave it out of the data, or predict without out=."
    )


def _digest_of_state(state: TrainState) -> str:
    seen = {"variables": state.variables, "step": state.step, "rng": state.rng}
    return _digest(named_leaves(seen))


def _digest_of_program(program: Any) -> str:
    # Functions are printed with their addresses.
    text = re.sub(r"0x[0-9a-f]+", "", str(program))
    return _digest([("text", np.frombuffer(text.encode(), np.uint8)), *enumerate(program.consts)])


def _digest(leaves: Any) -> str:
    total = hashlib.blake2b(digest_size=16)
    for name, leaf in leaves:
        array = np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
        total.update(f"{name} {array.dtype} {array.shape}".encode())
        total.update(repr(array.tolist()).encode() if array.dtype.kind == "O" else array.tobytes())
    return total.hexdigest()
