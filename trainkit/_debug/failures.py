"""What is kept of a step that went wrong: its batches, and the state before it where that is there.

Owns the folder `<logdir>/failures/<step>`; runs nothing.
"""

import collections
import contextlib
import itertools
import json
import pathlib
import shutil
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from trainkit._core.errors import NonFiniteError
from trainkit._core.files import remove
from trainkit._core.position import Position
from trainkit._core.state import TrainState
from trainkit._core.typing import Batch
from trainkit._engine.engine import Engine
from trainkit._feed.feed import Fed
from trainkit._resume.restore import arrays_of
from trainkit.checkpoint._encoding import decode, encode
from trainkit.checkpoint._store import Contents, Store
from trainkit.data._batch import unpad
from trainkit.data._source import Source

_PASSES_KNOWN = 64
_FOLDER = "failures"
_BATCHES, _ABOUT, _STATE = "batches.npz", "failure.json", "state"


class Failures:
    """Keeps what a step that went wrong needs to be run again.

    Args:
        engine: of the trainer.
        source: the training data.
        accumulate: batches that make one step.
        logdir: where to; None keeps nothing.
    """

    def __init__(self, engine: Engine, source: Source, accumulate: int, logdir: pathlib.Path | None) -> None:
        self._engine, self._source, self._accumulate = engine, source, accumulate
        # Of several processes none has the whole batch.
        self._logdir = None if engine.strategy.processes > 1 else logdir
        self._failing: list[tuple[int, Fed]] = []
        self._trail: collections.deque[tuple[int, int, int]] = collections.deque(maxlen=_PASSES_KNOWN)

    def begin(self, step: int, position: Position) -> None:
        """Notes a step and a place in the data from which steps and batches go side by side."""
        self._trail.append((step, position.epoch, position.batch))

    def note(self, step: int, feds: Sequence[Fed], error: Exception) -> None:
        """Notes that a call raised `error` which took `feds`, the first of them for `step`."""
        if isinstance(error, FloatingPointError):
            error.add_note(
                f"trainkit: this was step {step}, and trainer.state is the one before it. Without jax.debug_nans, "
                'tk.callbacks.NanGuard("raise") finds such a step at no such price and keeps its batch for '
                'trainer.replay; NanGuard("skip") passes over it, NanGuard("rollback") returns to a checkpoint.'
            )
        self._failing = list(enumerate(feds, start=step))

    def keep(self, error: BaseException, state: TrainState) -> None:
        """Writes down what there is of the step that `error` came from; never raises.

        Args:
            error: what ended the fit; gets a note where the batch could not be kept.
            state: the train state; of a step that a guard refused, the one before it.
        """
        if self._logdir is None:
            return
        try:
            if isinstance(error, NonFiniteError):
                before = state.replace(step=jnp.asarray(error.step - 1, jnp.int32))
                _keep(self._logdir, error.step, error, self._batches_of(error.step), before)
            for step, fed in self._failing:
                batches = list(fed.batch) if self._accumulate > 1 else [self._unpadded(fed)]
                _keep(self._logdir, step, error, batches, None)
        except Exception as another:
            error.add_note(f"its batch could not be kept: {another!r}")

    def _unpadded(self, fed: Fed) -> Batch:
        return fed.batch if self._engine.steps.units else unpad(fed.batch, fed.real)

    def _batches_of(self, step: int) -> list[Batch]:
        began, epoch, batch = next(entry for entry in reversed(self._trail) if entry[0] < step)
        start = batch + (step - 1 - began) * self._accumulate
        batches = self._engine.batches(self._source, epoch - 1, start)
        return list(itertools.islice(batches, self._accumulate))


def _keep(
    logdir: pathlib.Path, step: int, error: BaseException, batches: list[Batch], state: TrainState | None
) -> None:
    """Writes what a replay of a step needs.

    Args:
        logdir: of the run.
        step: number of the step, the updates completed after it.
        error: what went wrong.
        batches: of the step, on the host: several where gradients are accumulated.
        state: before the step; None where it is gone.
    """
    folder = logdir / _FOLDER / str(step)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    arrays: dict[str, jax.Array | np.ndarray] = {}
    structure = encode(jax.tree.map(jnp.asarray, batches), arrays, "batches")
    np.savez(
        folder / _BATCHES, allow_pickle=False, **{name: np.asarray(array) for name, array in arrays.items()}
    )
    about = {
        "step": step,
        "error": f"{type(error).__name__}: {error}",
        "time": time.time(),
        "batches": structure,
    }
    (folder / _ABOUT).write_text(json.dumps(about))
    if state is not None:
        store = Store(folder / _STATE)
        saved, spec = arrays_of(state)
        meta = {
            "step": step - 1,
            "time": time.time(),
            "scores": {},
            "best": None,
            "metadata": {},
            "arrays": spec,
        }
        store.save(step - 1, Contents(saved, {}, meta, {}))
        store.close()


def kept_batches(logdir: pathlib.Path | None, step: int) -> list[Batch] | None:
    """Returns the batches kept of a step, None where there are none."""
    folder = None if logdir is None else logdir / _FOLDER / str(step)
    if folder is None or not (folder / _ABOUT).is_file():
        return None
    about = json.loads((folder / _ABOUT).read_text())
    with np.load(folder / _BATCHES) as arrays:
        return decode(about["batches"], dict(arrays))


def kept_state(logdir: pathlib.Path | None, step: int) -> Store | None:
    """Returns the store that holds the state before a step, as a checkpoint of `step - 1`; None where none does."""
    store = None if logdir is None else Store(logdir / _FOLDER / str(step) / _STATE)
    return store if store is not None and step - 1 in store.steps() else None


def remove_failures(logdir: pathlib.Path) -> None:
    """Removes what was kept of steps that went wrong; leaves what others put into the folder.

    Raises:
        OSError: the system refused it.
    """
    folder = logdir / _FOLDER
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in [path for path in folder.iterdir() if path.name.isdecimal() and not path.is_symlink()]:
        Store(path / _STATE).clear()
        for name in (_BATCHES, _ABOUT):
            remove(path / name)
        with contextlib.suppress(OSError):
            path.rmdir()
    with contextlib.suppress(OSError):
        folder.rmdir()
