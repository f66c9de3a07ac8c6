"""Orbax, as the checkpoints use it. Owns the calls; not what is saved, nor when. Imported at the first use."""

import concurrent.futures
import contextlib
import json
import pathlib
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
    """

    documents: Mapping[str, Any]

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)
        folder = pathlib.Path(directory)
        for name, document in self.documents.items():
            (folder / name).write_text(json.dumps(document), encoding="utf-8")
        write_manifest(folder)


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
class _Args(ocp.args.Composite):
    """The items of one checkpoint."""


class AsyncWriter:
    """Writes checkpoints in the background, one at a time; complete or absent."""

    def __init__(self) -> None:
        self._handler = _Handler()
        self._checkpointer = ocp.AsyncCheckpointer(self._handler)

    def save(self, folder: pathlib.Path, trees: Mapping[str, PyTree], documents: Mapping[str, Any]) -> None:
        """Begins to write; returns when the arrays of `trees` may change.

        Args:
            folder: of the checkpoint; absolute, and not there.
            trees: nested dicts of arrays, by item.
            documents: JSON, by name of the file.
        """
        self._handler.documents = documents
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
        self._checkpointer.save(folder, args=_Args(**items))

    def wait(self) -> None:
        """Returns when all is written; raises what went wrong."""
        # Not from this thread: Python takes a thread for ended when a Ctrl-C breaks off the wait for it, and what
        # it was writing would be lost. A Ctrl-C is raised here when all is written.
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            pool.submit(self._checkpointer.wait_until_finished).result()

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
    with _reader() as reader:
        return reader.restore(folder / item, args=args)


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
