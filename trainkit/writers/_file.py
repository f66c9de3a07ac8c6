"""Files of records: appended whole, rewritten whole. Owns that nothing is left half done; knows no format."""

import contextlib
import os
import pathlib
import stat
import tempfile
import threading
from collections.abc import Iterator
from typing import BinaryIO

from trainkit._core.files import naming, open_regular

_CHUNK = 1 << 20


class RecordFile:
    """Appends records, each handed to the operating system before `append` returns.

    Nothing is buffered here, so there is nothing for a kill to lose or for a forked child to write twice. One
    call costs one system call, about a microsecond on a local disk.

    Args:
        path: the file; its folder exists. A link is not followed.
        exclusive: whether the file must be new.

    Raises:
        NotRegular: something else than a file lies there.
        FileExistsError: `exclusive`, and the file is there.

    Example:
        >>> import tempfile
        >>> file = RecordFile(pathlib.Path(tempfile.mkdtemp()) / "log")
        >>> file.append(b"one line")
        >>> file.close()
    """

    def __init__(self, path: pathlib.Path, *, exclusive: bool = False) -> None:
        extra = os.O_EXCL if exclusive else 0
        self._path = path
        self._file = open(  # noqa: SIM115 (held until close)
            path, "ab", buffering=0, opener=lambda name, flags: open_regular(name, flags | extra)
        )
        self._lock = threading.Lock()

    def append(self, record: bytes) -> None:
        """Appends a record, wholly or, where that fails (a full disk), not at all.

        Args:
            record: the bytes.

        Raises:
            OSError: the system refused it.
        """
        with self._lock, naming(self._path):
            start = os.fstat(self._file.fileno()).st_size
            rest = memoryview(record)
            try:
                while rest:
                    rest = rest[self._file.write(rest) :]
            except BaseException:
                with contextlib.suppress(OSError):
                    self._file.truncate(start)
                raise

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class Edit:
    """What is to be in a file: stretches of what it holds, and new records between them, in order.

    Stretches that lie side by side are one, so that an edit of a large file is small.

    Example:
        >>> edit = Edit()
        >>> edit.keep(0, 4)
        >>> edit.put(b"new")
    """

    def __init__(self) -> None:
        self._pieces: list[tuple[int, int] | bytes] = []

    def keep(self, start: int, stop: int) -> None:
        """Keeps the bytes from `start` up to `stop`."""
        last = self._pieces[-1] if self._pieces else b""
        if isinstance(last, tuple) and last[1] == start:
            self._pieces[-1] = (last[0], stop)
        else:
            self._pieces.append((start, stop))

    def put(self, record: bytes) -> None:
        """Adds a record."""
        self._pieces.append(record)

    def apply(self, file: BinaryIO, path: pathlib.Path) -> None:
        """Puts the new content in place of the file's such that a crash leaves the old one or the new one.

        Other names of the file (a backup made of hard links) keep the old content.

        Args:
            file: the file at `path`, open for reading.
            path: where the new content goes.

        Raises:
            OSError: the system refused it; the old content stands.
        """
        # The name must not look like a log to a reader that lists the folder meanwhile.
        handle, name = tempfile.mkstemp(prefix=".rewrite-", dir=path.parent)
        try:
            with naming(path), os.fdopen(handle, "wb") as new:
                for piece in self._pieces:
                    new.writelines(_chunks(file, *piece) if isinstance(piece, tuple) else [piece])
                new.flush()
                os.fsync(new.fileno())
            os.chmod(name, stat.S_IMODE(os.fstat(file.fileno()).st_mode))
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise


def _chunks(file: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    file.seek(start)
    while start < stop and (chunk := file.read(min(_CHUNK, stop - start))):
        yield chunk
        start += len(chunk)
