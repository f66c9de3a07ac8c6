"""The event file that TensorBoard reads: its name, its records and the mark that hides redone steps.

Owns no kinds of values. Imports tensorboardX, so it is itself imported where a file is needed.
"""

# tensorboardX makes its protocol buffers at run time, out of the type checker's sight.
# pyright: reportAttributeAccessIssue=false

import os
import pathlib
import socket
import struct
from collections.abc import Iterator

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from trainkit._typing import Clock
from trainkit.writers._file import RecordFile, rewrite

_SUFFIX = ".trainkit"
"""Ends the names of the files made here: the only ones that are ever rewritten."""


class EventFile:
    """One new event file in a folder.

    tensorboardX's own file writer hands events to a thread, and its `flush` does not wait for that thread.
    Here an event is with the operating system when `append` returns.

    Args:
        logdir: the folder; it exists.
        clock: seconds since 1970.
        purge_step: int; TensorBoard shows no event of an older file in the folder from this step on.
            Those of trainkit's files are taken out, those of others are marked as void.

    Example:
        >>> import tempfile, time
        >>> file = EventFile(pathlib.Path(tempfile.mkdtemp()), time.time, None)
        >>> file.append(1, [Summary.Value(tag="train/loss", simple_value=0.5)])
        >>> file.close()
    """

    def __init__(self, logdir: pathlib.Path, clock: Clock, purge_step: int | None) -> None:
        self._clock = clock
        if purge_step is not None:
            _take_out(logdir, purge_step)
        self._file = _new_file(logdir, clock())
        self._write(Event(wall_time=clock(), file_version="brain.Event:2"))
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            mark = Event(wall_time=clock(), step=purge_step, session_log=start)
            # TensorBoard takes the first mark in a folder for the start of the run and obeys from the second
            # on. Its fast loader ignores them all, which is why taking out comes first.
            self._write(mark)
            self._write(mark)

    def append(self, step: int, values: list[Summary.Value]) -> None:
        """Writes the values of one step as one event.

        Args:
            step: updates completed.
            values: one for each name.

        Raises:
            OSError: the system refused it.
        """
        self._write(Event(wall_time=self._clock(), step=step, summary=Summary(value=values)))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, event: Event) -> None:
        # TFRecord: length, its checksum, the data, its checksum, all little-endian.
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        checksums = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
        self._file.append(length + next(checksums) + data + next(checksums))


def _new_file(logdir: pathlib.Path, now: float) -> RecordFile:
    # TensorBoard reads the files of a folder in the order of their names: time comes first.
    microseconds = round(now * 1e6)
    while True:
        seconds, rest = divmod(microseconds, 1_000_000)
        name = f"events.out.tfevents.{seconds:010d}.{rest:06d}.{socket.gethostname()}.{os.getpid()}{_SUFFIX}"
        try:
            return RecordFile(logdir / name, exclusive=True)
        except FileExistsError:
            microseconds += 1


def _take_out(logdir: pathlib.Path, purge_step: int) -> None:
    """Takes the values from a step on out of the files of earlier writers."""
    for path in sorted(logdir.glob(f"*tfevents*{_SUFFIX}")):
        if any(not _is_before(record, purge_step) for record in _records(path)):
            rewrite(path, (record for record in _records(path) if _is_before(record, purge_step)))


def _is_before(record: bytes, step: int) -> bool:
    event = Event.FromString(record[12:-4])
    return event.step < step or not event.HasField("summary")


def _records(path: pathlib.Path) -> Iterator[bytes]:
    """Yields the records of a file, framing and all, up to the first that is cut short."""
    with path.open("rb") as file:
        while len(header := file.read(12)) == 12:
            (length,) = struct.unpack_from("<Q", header)
            rest = file.read(length + 4)
            if len(rest) < length + 4:
                return
            yield header + rest
