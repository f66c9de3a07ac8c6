"""The checkpoints of one folder, written and read by Orbax.

Owns the folder: what is in it, what is removed from it and what was left half done. Knows no loop; what a
checkpoint means is its maker's affair. Layout: `<folder>/<step>/` with Orbax's items `state` (arrays) and `extra`
(arrays of callbacks, where there are any), `meta.json`, `host.json`, and the list of files.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import pathlib
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from trainkit._core.atomic import write_atomic
from trainkit._core.tree import flat, nested
from trainkit.checkpoint._manifest import NAME as MANIFEST
from trainkit.checkpoint._manifest import problems
from trainkit.checkpoint._retention import Best, best_step, kept_steps

if TYPE_CHECKING:
    from trainkit.checkpoint._orbax import AsyncWriter

FOLDER = "checkpoints"
"""Name of the folder within a run's `logdir`."""

_LOG = logging.getLogger("trainkit")
_REMOVED = ".removed"
_DAMAGED = ".damaged"
_SCORES = "scores.json"
_HOST = "host.json"
META = "meta.json"
"""Name of the small document in the folder of each checkpoint."""
_LEFT_BEHIND = re.compile(rf"\d+({re.escape(_REMOVED)}|\.orbax-checkpoint-tmp.*)")


@dataclasses.dataclass(frozen=True)
class Contents:
    """What one checkpoint holds.

    Attributes:
        state: arrays by path name, e.g. `params/Dense_0/kernel`.
        extra: more arrays by name.
        meta: JSON, small: what lists of checkpoints show.
        host: JSON.
    """

    state: Mapping[str, jax.Array]
    extra: Mapping[str, jax.Array | np.ndarray]
    meta: dict[str, Any]
    host: dict[str, Any]


class Store:
    """The checkpoints of one folder.

    Of several processes all make one and call `save`, `load` and `wait` alike; the first alone removes.

    Args:
        folder: where they are; made where something is saved.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder.absolute()
        self._first = jax.process_index() == 0
        self._writer: AsyncWriter | None = None
        self._saving: int | None = None
        self._scores: dict[int, dict[str, float]] = {}  # read once
        self._removing: list[threading.Thread] = []

    # What there is --------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, in order."""
        return complete_steps(self.folder)

    def meta(self, step: int) -> dict[str, Any]:
        """Returns the `meta` of a checkpoint, with scores that came later.

        Raises:
            OSError, ValueError: it cannot be read.
        """
        return read_meta(self.folder, step)

    def scores(self) -> dict[int, dict[str, float]]:
        """Returns the metrics of every complete checkpoint by step; none for one that cannot be read."""
        known, self._scores = self._scores, {}
        for step in self.steps():
            self._scores[step] = known[step] if step in known else _read_scores(self.folder, step)
        return dict(self._scores)

    def best(self, best: Best) -> int | None:
        """Returns the step of the best checkpoint, None where none has the metric."""
        return best_step(self.scores(), best)

    def problems(self, step: int) -> list[str]:
        """Returns what is wrong with a checkpoint, one line each."""
        return problems(self.folder / str(step))

    # Saving ---------------------------------------------------------------------------------------------------

    def save(self, step: int, contents: Contents) -> None:
        """Begins to save; returns when the arrays may change, before the files are there.

        Waits for an earlier save that still runs.

        Args:
            step: updates completed; no checkpoint of it exists.
            contents: what to save.

        Raises:
            OSError: this or the save before it could not be written; older checkpoints are whole.
        """
        self.wait()
        trees: dict[str, Any] = {"state": nested(contents.state)}
        if contents.extra:
            trees["extra"] = dict(contents.extra)
        extra = {name: [str(array.dtype), list(array.shape)] for name, array in contents.extra.items()}
        documents = {META: contents.meta, _HOST: {"values": contents.host, "extra": extra}}
        with self._explaining(step):
            if (
                self.folder / str(step)
            ).exists():  # the rest of one, e.g. of a removal by hand that was broken off
                self.set_aside(step)
            self._open_writer().save(self.folder / str(step), trees, documents)
        self._saving = step

    def wait(self) -> None:
        """Returns when the running save is complete, durable to a SIGKILL.

        Raises:
            OSError: it could not be written.
        """
        step, self._saving = self._saving, None
        if step is not None and self._writer is not None:
            with self._explaining(step):
                self._writer.wait()

    def add_scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Notes metrics of a checkpoint that were not known when it was saved."""
        self.wait()
        self._scores.pop(step, None)
        if self._first and scores and (self.folder / str(step)).is_dir():
            write_atomic(self.folder / str(step) / _SCORES, json.dumps(dict(scores)).encode())

    def retain(self, keep: int | None, best: Best | None) -> None:
        """Removes all complete checkpoints but the `keep` newest (None: all) and the best one."""
        if not self._first:
            return
        scores = self.scores()
        for step in sorted(scores.keys() - kept_steps(scores, keep, best)):
            self._remove(self.folder / str(step))

    def remove(self, step: int) -> None:
        """Removes one complete checkpoint."""
        self._scores.pop(step, None)
        if self._first:
            self._remove(self.folder / str(step))

    def prepare(self) -> None:
        """Makes the folder where it is missing, before anything is trained that could not be saved there.

        Raises:
            OSError: it cannot be made or written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Permission bits do not tell: root ignores them, read-only disks have them. A real file does.
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise OSError(
                error.errno,
                f"checkpoints need a folder that can be created and written to ({error.strerror}); give another",
                str(self.folder),
            ) from error

    def clean(self) -> None:
        """Removes what a killed process left half done."""
        if self._first and self.folder.is_dir():
            for path in self.folder.iterdir():
                # Others may keep things of their own in the folder.
                if _LEFT_BEHIND.fullmatch(path.name):
                    shutil.rmtree(path, ignore_errors=True)

    def set_aside(self, step: int) -> None:
        """Renames a damaged checkpoint, so that its step can be saved again."""
        if self._first:
            path = self.folder / str(step)
            target = path.with_name(f"{step}{_DAMAGED}")
            if target.exists():
                shutil.rmtree(target)
            os.rename(path, target)

    def close(self) -> None:
        """Waits for the running save and gives up the threads."""
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.close()
                self._writer = None
            for thread in self._removing:
                thread.join()

    # Loading --------------------------------------------------------------------------------------------------

    def load_host(self, step: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Returns the `host` of a checkpoint, and its `extra` as NumPy arrays."""
        folder = self.folder / str(step)
        host = json.loads((folder / _HOST).read_bytes())
        if not host["extra"]:
            return host["values"], {}
        from trainkit.checkpoint._orbax import read

        target = {
            name: np.empty(shape, jax.numpy.dtype(dtype)) for name, (dtype, shape) in host["extra"].items()
        }
        return host["values"], read(folder, "extra", target)

    def load_state(self, step: int, target: Mapping[str, Any]) -> dict[str, Any]:
        """Returns arrays of a checkpoint.

        Args:
            step: of a complete checkpoint.
            target: `jax.ShapeDtypeStruct` by path name: with a sharding for an array on devices, without one
                for a NumPy array. A part of what was saved is enough.
        """
        from trainkit.checkpoint._orbax import read

        return flat(read(self.folder / str(step), "state", nested(target)))

    # ----------------------------------------------------------------------------------------------------------

    def _open_writer(self) -> "AsyncWriter":
        # Orbax takes a while to import, which a program without checkpoints need not wait for.
        from trainkit.checkpoint._orbax import AsyncWriter

        if self._writer is None:
            self._writer = AsyncWriter()
        return self._writer

    @contextlib.contextmanager
    def _explaining(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._saving = None
            whole = [known for known in self.steps() if known != step]
            newest = f"The newest complete one is of step {whole[-1]}." if whole else "There is no older one."
            raise OSError(
                getattr(error, "errno", None) or errno.EIO,
                f"the checkpoint of step {step} could not be saved ({type(error).__name__}: {error}). {newest} "
                "Make room or give another folder, then run again with resume=True",
                str(self.folder),
            ) from error

    def _remove(self, path: pathlib.Path) -> None:
        # Renamed first: a checkpoint is there as a whole or not at all.
        removed = path.with_name(path.name + _REMOVED)
        os.rename(path, removed)
        # Deleting takes longer than it takes to begin a save, and nobody waits for it.
        thread = threading.Thread(target=shutil.rmtree, args=(removed, True), name="trainkit-remove")
        thread.start()
        self._removing = [one for one in self._removing if one.is_alive()] + [thread]


def complete_steps(folder: pathlib.Path) -> list[int]:
    """Returns the steps of the complete checkpoints in `folder`, in order."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if _is_checkpoint(path))


def _is_checkpoint(path: pathlib.Path) -> bool:
    # Damaged ones count; a folder that somebody named 2024 does not.
    named = path.name.isdecimal() and path.name == str(int(path.name))
    return named and any((path / ours).exists() for ours in (META, _HOST, MANIFEST))


def read_meta(folder: pathlib.Path, step: int) -> dict[str, Any]:
    """Returns the `meta` of a checkpoint, with the scores that came later."""
    path = folder / str(step)
    meta = json.loads((path / META).read_bytes())
    # Unreadable, they are no reason to refuse the checkpoint: nothing that is trained depends on them.
    with contextlib.suppress(OSError, ValueError):
        meta["scores"] = {**meta["scores"], **json.loads((path / _SCORES).read_bytes())}
    return meta


def _read_scores(folder: pathlib.Path, step: int) -> dict[str, float]:
    try:
        return read_meta(folder, step)["scores"]
    except (OSError, ValueError, KeyError):
        return {}
