"""What is kept of a step that went wrong: its batches, and the state before it where that is there.

Owns the folder `<logdir>/failures/<step>`; runs nothing.
"""

import collections
import contextlib
import itertools
import json
import pathlib
import time
import zipfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainkit._core.arrays import dtype_of
from trainkit._core.errors import NonFiniteError
from trainkit._core.files import make_folder, open_regular, read_regular, remove
from trainkit._core.position import Position
from trainkit._core.state import TrainState
from trainkit._core.typing import Batch
from trainkit._engine.engine import Engine
from trainkit._feed.feed import Fed
from trainkit._feed.resident import Supply
from trainkit._resume.restore import arrays_of
from trainkit._resume.saved import meta_of
from trainkit.checkpoint._encoding import decode, encode
from trainkit.checkpoint._store import Contents, Store
from trainkit.data._batch import check_batch, unpad
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

    def note(self, step: int, feds: Sequence[Fed], error: Exception, supply: Supply) -> None:
        """Notes that a call raised `error` which took `feds` of `supply`, the first of them for `step`."""
        if isinstance(error, FloatingPointError):
            error.add_note(
                f"trainkit: this was step {step}, and trainer.state is the one before it. Without jax.debug_nans, "
                'tk.callbacks.NanGuard("raise") finds such a step at no such price and keeps its batch for '
                'trainer.replay; NanGuard("skip") passes over it, NanGuard("rollback") returns to a checkpoint.'
            )
        feds = [fed._replace(batch=supply.read(fed.batch)) for fed in feds]
        self._failing = list(enumerate(feds, start=step))
        if isinstance(error, TypeError):
            for fed in feds:  # names the leaf that no step can take, where that was the reason
                check_batch(fed.batch)

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
    logdir.mkdir(parents=True, exist_ok=True)
    make_folder(logdir / _FOLDER)
    folder = logdir / _FOLDER / str(step)
    remove(folder)
    make_folder(folder)
    arrays: dict[str, jax.Array | np.ndarray] = {}
    structure = encode(jax.tree.map(jnp.asarray, batches), arrays, "batches")
    host = {name: np.asarray(array) for name, array in arrays.items()}
    np.savez(folder / _BATCHES, allow_pickle=False, **host)
    about = {
        "step": step,
        "error": f"{type(error).__name__}: {error}",
        "time": time.time(),
        "batches": structure,
        # NumPy's files do not know those that JAX adds.
        "dtypes": {name: str(array.dtype) for name, array in host.items()},
    }
    (folder / _ABOUT).write_text(json.dumps(about))
    if state is not None:
        store = Store(folder / _STATE)
        labels = {"scores": {}, "best": None, "metadata": {}}
        saved, spec = arrays_of(state)
        store.save(step - 1, Contents(saved, {}, {**meta_of(state, spec, step - 1), **labels}, {}))
        store.close()


def kept_batches(logdir: pathlib.Path | None, step: int) -> list[Batch] | None:
    """Returns the batches kept of a step, None where there are none.

    Raises:
        ValueError, OSError: the files are not what was kept; the message names them.
    """
    folder = None if logdir is None else logdir / _FOLDER / str(step)
    if folder is None or not (folder / _ABOUT).is_file():
        return None
    try:
        about = json.loads(read_regular(folder / _ABOUT))
        if not isinstance(about, dict) or not isinstance(about.get("dtypes"), dict):
            raise ValueError("it lacks what was kept")
        batches = decode(about.get("batches"), _arrays(folder / _BATCHES, about["dtypes"]))
        if not isinstance(batches, list) or not batches:
            raise ValueError("it holds no batches")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{folder / _ABOUT} and {_BATCHES} beside it are not what was kept of step {step}: {error}. Move the "
            "folder away to replay the step from a checkpoint."
        ) from error
    return batches


def _arrays(path: pathlib.Path, dtypes: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns the arrays in a file that `_keep` wrote; raises ValueError for another, and OSError for none."""
    with open(open_regular(path), "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
            # What is packed may be of any size once it is unpacked, and `savez` packs nothing.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError(f"{_BATCHES} is compressed")
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise ValueError(f"{_BATCHES} claims more bytes than it has")
            file.seek(0)
            with np.load(file, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
        except (zipfile.BadZipFile, EOFError, MemoryError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"{_BATCHES} can't be read ({error})") from error
    return {name: _as_was(array, dtype_of(dtypes.get(name))) for name, array in arrays.items()}


def _as_was(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if array.dtype != dtype and array.dtype != f"V{dtype.itemsize}":
        raise ValueError(f"{_BATCHES} has an array of {array.dtype} for one of {dtype}")
    return array.view(dtype)


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
