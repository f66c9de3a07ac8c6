"""Files that are whole or absent. Owns the order of writing, syncing and renaming; knows no format."""

import os
import pathlib
import uuid

from trainkit._core.files import naming


def write_atomic(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes `content` to `path` such that a reader sees the old file or the new one, also after a crash.

    A write that fails leaves the old file as it was and nothing beside it. A symbolic link stays one: the
    file it points to is replaced.

    Args:
        path: the file to write; its folder must exist.
        content: the whole file.

    Raises:
        OSError: the folder is missing or cannot be written, or the disk is full.
    """
    target = pathlib.Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{os.fspath(path)}: there is no folder {target.parent}. Make it first.")
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        # "x" and not a `tempfile`: the file gets the permissions of any other file the process writes.
        with naming(path), open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def sync_folder(path: pathlib.Path) -> None:
    """Makes renames inside the folder `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
