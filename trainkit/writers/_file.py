"""Files of records: appended whole, rewritten whole. Owns that nothing is left half done; knows no format."""

import contextlib
import os
import pathlib
import tempfile
import threading
from collections.abc import Iterable


class RecordFile:
    """Appends records, each handed to the operating system before `append` returns.

    Nothing is buffered here, so there is nothing for a kill to lose or for a forked child to write twice. One
    call costs one system call, about a microsecond on a local disk.

    Args:
        path: the file; its folder exists.
        exclusive: whether the file must be new.

    Raises:
        FileExistsError: `exclusive`, and the file is there.

    Example:
        >>> import tempfile
        >>> file = RecordFile(pathlib.Path(tempfile.mkdtemp()) / "log")
        >>> file.append(b"one line")
        >>> file.close()
    """

    def __init__(self, path: pathlib.Path, *, exclusive: bool = False) -> None:
        extra = os.O_EXCL if exclusive else 0
        self._file = open(  # noqa: SIM115 (held until close)
            path, "ab", buffering=0, opener=lambda name, flags: os.open(name, flags | extra, 0o666)
        )
        self._lock = threading.Lock()

    def append(self, record: bytes) -> None:
        """Appends a record, wholly or, where that fails (a full disk), not at all.

        Args:
            record: the bytes.

        Raises:
            OSError: the system refused it.
        """
        with self._lock:
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


def rewrite(path: pathlib.Path, records: Iterable[bytes]) -> None:
    """Puts new content in place of a file's such that a crash leaves the one or the other.

    Args:
        path: the file; it exists.
        records: the new content, in order.

    Raises:
        OSError: the system refused it; the old content stands.
    """
    # The name must not look like a log to a reader that lists the folder meanwhile.
    handle, name = tempfile.mkstemp(prefix=".rewrite-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines(records)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, path.stat().st_mode)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
