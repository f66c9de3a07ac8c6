"""The checkpoints of one folder, written and read by Orbax.

Owns the folder: what is in it, what is removed from it and what was left half done. Knows no loop; what a
checkpoint means is its maker's affair.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from trainkit._core.arrays import dtype_of, shape_of
from trainkit._core.atomic import write_atomic
from trainkit._core.files import check_regular, remove
from trainkit._core.tree import flat, nested
from trainkit.checkpoint._clearing import clear
from trainkit.checkpoint._reading import (
    EXTRA,
    HOST,
    META,
    SCORES,
    STATE,
    complete_steps,
    is_checkpoint,
    problems_of,
    read_host,
    read_meta,
    read_scores,
)
from trainkit.checkpoint._retention import Best, Retention, best_step

if TYPE_CHECKING:
    from trainkit.checkpoint._orbax import AsyncWriter

_REMOVED = ".removed"
_DAMAGED = ".damaged"
_TEMPORARY = ".orbax-checkpoint-tmp"
_LEFT_BEHIND = re.compile(rf"\d+({re.escape(_REMOVED)}|{re.escape(_TEMPORARY)}.*)")
_SET_ASIDE = re.compile(rf"\d+{re.escape(_DAMAGED)}")


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

    Of several processes all make one and call `save`, `load` and `wait` alike; the first alone removes. While a save
    runs, the thread that ends it has the folder: call `wait` before anything else.

    Args:
        folder: where they are; made where something is saved.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder.absolute()
        self._first = jax.process_index() == 0
        self._writer: AsyncWriter | None = None
        self._ends = concurrent.futures.ThreadPoolExecutor(1, "trainkit-save")
        self._saving: concurrent.futures.Future[None] | None = None
        self._scores: dict[int, dict[str, float]] = {}  # read once

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
            self._scores[step] = known[step] if step in known else read_scores(self.folder, step)
        return dict(self._scores)

    def best(self, best: Best) -> int | None:
        """Returns the step of the best checkpoint, None where none has the metric."""
        return best_step(self.scores(), best)

    def problems(self, step: int) -> list[str]:
        """Returns what is wrong with a checkpoint, one line each."""
        return problems_of(self.folder, step)

    # Saving ---------------------------------------------------------------------------------------------------

    def save(self, step: int, contents: Contents, retention: Retention | None = None) -> None:
        """Begins to save; returns when the arrays may change, before the files are there.

        Waits for an earlier save that still runs.

        Args:
            step: updates completed; no checkpoint of it exists.
            contents: what to save.
            retention: what else is removed once it is complete; None removes nothing.

        Raises:
            OSError: this or the save before it could not be written; older checkpoints are whole.
        """
        self.wait()
        trees: dict[str, Any] = {STATE: nested(contents.state)}
        if contents.extra:
            trees[EXTRA] = dict(contents.extra)
        extra = {name: [str(array.dtype), list(array.shape)] for name, array in contents.extra.items()}
        documents = {META: contents.meta, HOST: {"values": contents.host, "extra": extra}}
        with self._explaining(step):
            path = self.folder / str(step)
            if path.exists() or path.is_symlink():  # the rest of one, e.g. of a removal that was broken off
                self.set_aside(step)
            self._try_to_begin(step)
            self._open_writer().save(path, trees, documents)
        self._saving = self._ends.submit(self._end, step, retention)

    def _try_to_begin(self, step: int) -> None:
        # Orbax, refused the folders it makes in a thread, has its other threads wait for them for five minutes.
        if self._first:
            probe = self.folder / f"{step}{_TEMPORARY}-probe"
            try:
                os.makedirs(probe / "item", exist_ok=True)
                (probe / "file").touch()
            finally:
                self._ends.submit(remove, probe)

    def _end(self, step: int, retention: Retention | None) -> None:
        assert self._writer is not None
        with self._explaining(step):
            self._writer.wait()
        if retention is not None:
            self.retain(retention)

    def wait(self) -> None:
        """Returns when the running save is complete, durable to a SIGKILL, and what it replaces no checkpoint any more.

        Raises:
            OSError: it could not be written.
        """
        if self._saving is None:
            return
        try:
            self._saving.result()
        finally:
            # A Ctrl-C is raised when all is written.
            concurrent.futures.wait([self._saving])
            self._saving = None

    def add_scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Notes metrics of a checkpoint that were not known when it was saved."""
        self.wait()
        self._scores.pop(step, None)
        path = self.folder / str(step)
        if self._first and scores and path.is_dir() and not path.is_symlink():
            check_regular(path / SCORES, missing_ok=True)
            write_atomic(path / SCORES, json.dumps(dict(scores)).encode())

    def retain(self, retention: Retention) -> None:
        """Removes the complete checkpoints that `retention` does not keep."""
        if not self._first:
            return
        scores = self.scores()
        for step in sorted(scores.keys() - retention.kept(scores)):
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
        from trainkit.checkpoint._orbax import can_write_below

        if not can_write_below(self.folder, jax.process_count()):
            raise OSError(
                errno.EINVAL,
                "checkpoints can't be written here below a name with any of * ? [ ] { } \\ in it; give another",
                str(self.folder),
            )

    def clean(self) -> None:
        """Removes what a killed process left half done."""
        if self._first and self.folder.is_dir():
            for path in self.folder.iterdir():
                # Others may keep things of their own in the folder.
                if _LEFT_BEHIND.fullmatch(path.name):
                    with contextlib.suppress(OSError):
                        remove(path)

    def clear(self) -> None:
        """Removes every file that was written here, and the folders that are empty then; leaves what others put in.

        Raises:
            OSError: the system refused it.
        """
        if not (self._first and self.folder.is_dir()):
            return
        self.clean()
        for path in list(self.folder.iterdir()):
            if _SET_ASIDE.fullmatch(path.name) or is_checkpoint(path):
                clear(path)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def set_aside(self, step: int) -> None:
        """Renames a damaged checkpoint, so that its step can be saved again."""
        if self._first:
            path = self.folder / str(step)
            target = path.with_name(f"{step}{_DAMAGED}")
            remove(target)
            os.rename(path, target)

    def close(self) -> None:
        """Waits for the running save and gives up the threads."""
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.close()
                self._writer = None
            self._ends.shutdown()

    # Loading --------------------------------------------------------------------------------------------------

    def load_host(self, step: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Returns the `host` of a checkpoint, and its `extra` as NumPy arrays."""
        folder = self.folder / str(step)
        host = read_host(self.folder, step)
        if not host["extra"]:
            return host["values"], {}
        from trainkit.checkpoint._orbax import read

        target = {
            name: jax.ShapeDtypeStruct(shape_of(shape), dtype_of(dtype))
            for name, (dtype, shape) in host["extra"].items()
        }
        return host["values"], read(folder, EXTRA, target)

    def load_state(self, step: int, target: Mapping[str, Any]) -> dict[str, Any]:
        """Returns arrays of a checkpoint.

        Args:
            step: of a complete checkpoint.
            target: `jax.ShapeDtypeStruct` by path name: with a sharding for an array on devices, without one
                for a NumPy array. A part of what was saved is enough.
        """
        from trainkit.checkpoint._orbax import read

        return flat(read(self.folder / str(step), STATE, nested(target)))

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
        remove(removed)
        os.rename(path, removed)
        # Deleting takes longer than it takes to begin a save, and nobody waits for it; `clean` makes up for a failure.
        self._ends.submit(remove, removed)
