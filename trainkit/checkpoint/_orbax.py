"""Orbax, as the checkpoints use it. Owns the calls; not what is saved, nor when. Imported at the first use."""

import contextlib
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from trainkit._core.typing import PyTree
from trainkit.checkpoint._manifest import write_manifest


class _Handler(ocp.CompositeCheckpointHandler):
    """Orbax's handler of several items, which adds our files before the folder gets its final name.

    Attributes:
        documents: JSON to write beside the items, by name of the file. An item of Orbax for each would start
            threads while training waits; this is done in the background, by the first process.
        items: names of Orbax's items.
    """

    documents: Mapping[str, Any]
    items: tuple[str, ...]

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)
        folder = pathlib.Path(directory)
        for name, document in self.documents.items():
            (folder / name).write_text(json.dumps(document), encoding="utf-8")
        write_manifest(folder, items=self.items, documents=tuple(self.documents))


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
class _Args(ocp.args.Composite):
    """The items of one checkpoint."""


class AsyncWriter:
    """Writes checkpoints in the background, one at a time; complete or absent."""

    def __init__(self) -> None:
        self._handler = _Handler()
        self._checkpointer = ocp.AsyncCheckpointer(self._handler)
        self._under_safe_names = contextlib.ExitStack()

    def save(self, folder: pathlib.Path, trees: Mapping[str, PyTree], documents: Mapping[str, Any]) -> None:
        """Begins to write; returns when the arrays of `trees` may change.

        Args:
            folder: of the checkpoint; absolute, and not there.
            trees: nested dicts of arrays, by item.
            documents: JSON, by name of the file.
        """
        self._handler.documents, self._handler.items = documents, tuple(trees)
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
        safe = self._under_safe_names.enter_context(_under_safe_name(folder))
        self._checkpointer.save(safe, args=_Args(**items))

    def wait(self) -> None:
        """Returns when all is written; raises what went wrong. Not for the main thread.

        Python takes a thread for ended when a Ctrl-C breaks off the wait for it, and what it was writing would be lost.
        """
        try:
            self._checkpointer.wait_until_finished()
        finally:
            self._under_safe_names.close()

    def close(self) -> None:
        """Gives up the threads."""
        self._checkpointer.close()


def read(folder: pathlib.Path, item: str, target: PyTree) -> Any:
    """Returns the arrays of an item.

    Args:
        folder: of the checkpoint.
        item: its name.
        target: nested dicts, a part of what was saved is enough; leaves with a `sharding` become JAX arrays,
            others NumPy arrays.
    """
    args = ocp.args.PyTreeRestore(
        item=target, restore_args=jax.tree.map(_restore_args, target), partial_restore=True
    )
    with _under_safe_name(folder) as safe, _reader() as reader:
        return reader.restore(safe / item, args=args)


_PATTERN = re.compile(r"[*?\[\]{}\\]")
_DESCRIPTORS = pathlib.Path("/proc/self/fd")


def can_write_below(folder: pathlib.Path, processes: int) -> bool:
    """Says whether Orbax can write below a folder.

    Args:
        folder: absolute.
        processes: how many write together; each knows a descriptor under a number of its own.
    """
    return not _PATTERN.search(str(folder)) or (_DESCRIPTORS.is_dir() and processes == 1)


@contextlib.contextmanager
def _under_safe_name(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a name of a folder, whose parent exists, that Orbax does not take for a pattern: it would find nothing."""
    if not (_PATTERN.search(str(folder)) and _DESCRIPTORS.is_dir()):
        yield folder
        return
    descriptor = os.open(folder.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield _DESCRIPTORS / str(descriptor) / folder.name
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _reader() -> Iterator[ocp.Checkpointer]:
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    try:
        yield reader
    finally:
        reader.close()


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
    if getattr(leaf, "sharding", None) is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(
        restore_type=jax.Array, sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype
    )
