"""The event file that TensorBoard reads: its name, its records and the mark that hides redone steps.

Owns no kinds of values. Imports tensorboardX, so it is itself imported where a file is needed.
"""

# tensorboardX makes its protocol buffers at run time, out of the type checker's sight.
# pyright: reportAttributeAccessIssue=false

import os
import pathlib
import socket
import struct
from collections.abc import Callable, Collection, Iterator

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from trainkit._core.typing import Clock
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
        self._file.append(_framed(event))


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


def rewind(logdir: pathlib.Path, step: int, names: Collection[str]) -> bool:
    """Takes values after `step` out of the files in a folder, and at `step` those of other names.

    Args:
        logdir: the folder.
        step: updates completed.
        names: as given to the writer; it may have made several tags of one, `name/0`, `name/1`, ...

    Returns:
        Whether anything was taken out.
    """

    def kept(value: Summary.Value) -> bool:
        parts = value.tag.split("/")
        return any("/".join(parts[:length]) in names for length in range(1, len(parts) + 1))

    def change(event: Event) -> Event | None:
        if not event.HasField("summary") or event.step < step:
            return event
        values = [value for value in event.summary.value if event.step == step and kept(value)]
        if len(values) == len(event.summary.value):
            return event
        return Event(wall_time=event.wall_time, step=step, summary=Summary(value=values)) if values else None

    changed = [_rewrite(path, change) for path in _files(logdir)]
    return any(changed)


def _take_out(logdir: pathlib.Path, purge_step: int) -> None:
    """Takes the values from a step on out of the files of earlier writers."""

    def change(event: Event) -> Event | None:
        return event if event.step < purge_step or not event.HasField("summary") else None

    for path in _files(logdir):
        _rewrite(path, change)


def _files(logdir: pathlib.Path) -> list[pathlib.Path]:
    return sorted(logdir.glob(f"*tfevents*{_SUFFIX}"))


def _rewrite(path: pathlib.Path, change: Callable[[Event], Event | None]) -> bool:
    """Puts what `change` makes of each event into a file, and says whether that is anything else."""
    records, changed = [], False
    for record in _records(path):
        event = Event.FromString(record[12:-4])
        new = change(event)
        if new is not event:
            changed = True
            record = b"" if new is None else _framed(new)
        records.append(record)
    if changed:
        rewrite(path, records)
    return changed


def _framed(event: Event) -> bytes:
    # TFRecord: length, its checksum, the data, its checksum, all little-endian.
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    checksums = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
    return length + next(checksums) + data + next(checksums)


def _records(path: pathlib.Path) -> Iterator[bytes]:
    """Yields the records of a file, framing and all, up to the first that is cut short."""
    with path.open("rb") as file:
        while len(header := file.read(12)) == 12:
            (length,) = struct.unpack_from("<Q", header)
            rest = file.read(length + 4)
            if len(rest) < length + 4:
                return
            yield header + rest
