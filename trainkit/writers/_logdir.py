"""Which folders this process logs to. Owns the check that a folder can be written to, not what is written."""

import contextlib
import fcntl
import logging
import os
import pathlib
import socket
import tempfile
import threading
import weakref
from collections.abc import Iterator

from trainkit._core.files import open_regular, part

_LOG = logging.getLogger("trainkit")
_LOCK = ".trainkit.lock"

_owners: weakref.WeakValueDictionary[tuple[str, str], object] = weakref.WeakValueDictionary()
"""The live writer of each folder and kind; one that is collected without `close` frees its folder."""

_lock = threading.Lock()

_locks: set[int] = set()
"""Descriptors of the locks that this process holds."""


def _forget_locks() -> None:
    # A lock belongs to the open file, which a forked child shares: it would outlive the run.
    for descriptor in _locks:
        os.close(descriptor)
    _locks.clear()


os.register_at_fork(after_in_child=_forget_locks)


def claim(logdir: str | os.PathLike[str], kind: str, owner: object) -> pathlib.Path:
    """Makes a folder ready and reserves it for one writer of a kind.

    Args:
        logdir: a local folder; it is created where it is missing.
        kind: what is written there, e.g. "TensorBoard".
        owner: the writer.

    Returns:
        The folder.

    Raises:
        OSError: the folder cannot be made or written to.
        ValueError: it is remote, or a live writer of this kind has it.
    """
    folder = local_folder(logdir)
    _check_writable(folder)
    key = (os.path.realpath(folder), kind)
    with _lock:
        if key in _owners:
            raise ValueError(
                f"logdir={os.fspath(logdir)!r} already has a live {kind} writer in this process; two would "
                "mix their logs. Close the first one (close()), share it, or give the second its own folder."
            )
        _owners[key] = owner
    return folder


def local_folder(logdir: str | os.PathLike[str]) -> pathlib.Path:
    """Returns `logdir` as a path; nothing is made yet.

    Raises:
        ValueError: it is remote.
    """
    name = os.fspath(logdir)
    # To be asked before there is a `Path`, which would make one slash of the two.
    if "://" in name:
        raise ValueError(
            f"logdir={name!r} is a remote address; a logdir is a local folder. "
            "Log to one and copy it, or mount the bucket."
        )
    return pathlib.Path(name)


@contextlib.contextmanager
def locked(logdir: pathlib.Path | None) -> Iterator[None]:
    """Keeps other runs from training into a folder; the lock ends with this process, however that ends.

    Args:
        logdir: the run's folder, made where it is missing; None locks nothing.

    Raises:
        OSError: the folder cannot be made or written to, or the lock is no regular file.
        ValueError: another run has it, in this process or another.
    """
    if logdir is None:
        yield
        return
    _check_writable(logdir)
    descriptor = _lock_file(logdir)
    _locks.add(descriptor)
    try:
        # Who has it is for people to read; a full disk is no reason not to train.
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        if descriptor in _locks:  # not in a child that was forked meanwhile
            _locks.discard(descriptor)
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _lock_file(logdir: pathlib.Path) -> int:
    """Returns the descriptor of the lock, which this process then has."""
    path = logdir / _LOCK
    while True:
        descriptor = open_regular(path, os.O_RDWR | os.O_CREAT, parted=False)
        try:
            _take(descriptor, logdir)
            status = os.fstat(descriptor)
            if status.st_nlink == 1 and os.path.samestat(status, os.stat(path, follow_symlinks=False)):
                return descriptor
            # The file has other names, as in a copy made of hard links, which nothing is to be written to; or it was
            # replaced meanwhile.
            if status.st_nlink > 1:
                part(path)
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _take(descriptor: int, logdir: pathlib.Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        raise ValueError(
            f"logdir={os.fspath(logdir)!r} is being written to by another run ({who}). Give this one another folder, "
            "or wait for that to end."
        ) from None
    except OSError as error:  # some network file systems know no locks
        _LOG.warning("logdir %s cannot be locked (%s): see to it that one run writes there.", logdir, error)


def release(logdir: str | os.PathLike[str], kind: str, owner: object) -> None:
    """Frees a folder that `owner` claimed; does nothing where it has it no longer."""
    key = (os.path.realpath(logdir), kind)
    with _lock:
        if _owners.get(key) is owner:
            del _owners[key]


def _check_writable(folder: pathlib.Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Permission bits do not tell: root ignores them, read-only disks have them. A real file does.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            error.errno,
            f"logdir must be a folder that can be created and written to ({error.strerror}); give another",
            str(folder),
        ) from error
