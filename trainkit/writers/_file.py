"""A file that only grows, by whole records. Owns durability within the process; knows no format."""

import contextlib
import os
import pathlib
import threading


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
