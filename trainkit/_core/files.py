"""Files and folders of a run, touched with care: regular ones only, never through a link. Knows no format.

A run's folder may be copied, sent around and written to by others: what lies in it under a name of ours need not be
ours.
"""

import contextlib
import errno
import os
import pathlib
import shutil
import stat
import tempfile
from collections.abc import Iterator

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class NotRegular(OSError):
    """Something other than a regular file lies under the name of one.

    Args:
        path: the name.
        kind: what lies there.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str) -> None:
        super().__init__(None, f"is {kind}, where a regular file is expected; move it away", os.fspath(path))
        self.kind = kind

    def __str__(self) -> str:
        return f"{self.filename!r} {self.strerror}."


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Gives an error of the system that names no file (a full disk) the name of the one that was written."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


def open_regular(
    path: str | os.PathLike[str], flags: int = os.O_RDONLY, mode: int = 0o666, *, parted: bool = True
) -> int:
    """Opens a regular file and returns its descriptor; links are not followed, and nothing blocks.

    To write, a file must have this name alone: one that has others (a backup made of hard links) is first given a
    content of its own, so that they keep what they have.

    Args:
        path: the file.
        flags: as for `os.open`, without `O_TRUNC`: it is not known yet what would be emptied.
        mode: permissions of a file that is made.
        parted: whether a file that is to be written is given a content of its own.

    Raises:
        NotRegular: something else lies there.
        OSError: the system refused it.
    """
    check_regular(path, missing_ok=True)
    parted = parted and bool(flags & (os.O_WRONLY | os.O_RDWR))
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and not (parted and status.st_nlink > 1):
        return descriptor
    os.close(descriptor)
    check_regular(path)
    part(pathlib.Path(path))
    return open_regular(path, flags, mode)


def check_regular(path: str | os.PathLike[str], *, missing_ok: bool = False) -> None:
    """Refuses what is no regular file.

    Args:
        path: the file.
        missing_ok: whether it may be absent.

    Raises:
        NotRegular: something else lies there.
        FileNotFoundError: nothing does.
    """
    try:
        kind = stat.S_IFMT(os.lstat(path).st_mode)
    except FileNotFoundError:
        if missing_ok:
            return
        raise
    if kind != stat.S_IFREG:
        raise NotRegular(path, _KINDS.get(kind, "something else"))


def read_regular(path: str | os.PathLike[str], most: int | None = None) -> bytes:
    """Returns the content of a regular file.

    Args:
        path: the file.
        most: bytes that it may have; None for any number.

    Raises:
        OSError: as `open_regular`, or the file is larger.
    """
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise OSError(
                errno.EFBIG, f"has {size} bytes, where {most} at most are expected", os.fspath(path)
            )
        return file.read()


def part(path: pathlib.Path) -> None:
    """Gives a file a content of its own, so that other names of the file keep what they have."""
    handle, name = tempfile.mkstemp(prefix=".part-", dir=path.parent)
    try:
        with naming(path), open(open_regular(path), "rb") as old, os.fdopen(handle, "wb") as new:
            shutil.copyfileobj(old, new)
        shutil.copystat(path, name)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def make_folder(path: pathlib.Path) -> None:
    """Makes a folder in one that exists, unless it is there.

    Raises:
        OSError: it is a link or no folder, or the system refused it.
    """
    try:
        path.mkdir()
    except FileExistsError:
        if path.is_symlink() or not path.is_dir():
            raise NotADirectoryError(
                None, "is no folder of its own but a link or a file; move it away", str(path)
            ) from None


def remove(path: pathlib.Path) -> None:
    """Removes a file, a folder with all in it, or a link (and nothing that it points to); absent is as well.

    Raises:
        OSError: the system refused it.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
