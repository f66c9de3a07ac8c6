"""Removing what was written of a checkpoint, and nothing that others put into its folder."""

import contextlib
import os
import pathlib

from trainkit._core.files import remove
from trainkit.checkpoint._manifest import NAME as MANIFEST
from trainkit.checkpoint._manifest import listed
from trainkit.checkpoint._reading import EXTRA, HOST, META, SCORES, STATE

_ORBAX = ("_CHECKPOINT_METADATA", "commit_success.txt")


def clear(path: pathlib.Path) -> None:
    """Removes what was written of a checkpoint, by its list; without one, what has a name of ours."""
    if path.is_symlink():
        path.unlink()
        return
    ours = [path / name for name in listed(path)] or [path / STATE, path / EXTRA]
    ours += [path / name for name in (META, HOST, SCORES, MANIFEST, *_ORBAX)]
    for one in ours:
        # Nothing behind a link is ours.
        if not any(parent.is_symlink() for parent in one.parents if parent.is_relative_to(path)):
            remove(one)
    for inner, _, _ in os.walk(path, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(inner)
