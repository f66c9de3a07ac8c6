"""The event file that TensorBoard reads: its name, its events and the mark that hides redone steps.

Owns no framing and no kinds of values. Imports tensorboardX, so it is itself imported where a file is needed.
"""

# tensorboardX makes its protocol buffers at run time, out of the type checker's sight.
# pyright: reportAttributeAccessIssue=false

import logging
import os
import pathlib
import socket
from collections.abc import Callable, Collection

from google.protobuf.message import DecodeError, EncodeError
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from trainkit._core.files import NotRegular, open_regular
from trainkit._core.typing import Clock
from trainkit.writers._file import Edit, RecordFile
from trainkit.writers._tfrecord import MOST, framed, records
from trainkit.writers._values import Unwritable

_LOG = logging.getLogger("trainkit")
_SUFFIX = ".trainkit"
"""Ends the names of the files made here: the only ones that are ever rewritten."""


class EventFile:
    """One new event file in a folder.

    tensorboardX's own file writer hands events to a thread, and its `flush` does not wait for that thread.
    Here an event is with the operating system when `append` returns.

    Args:
        logdir: the folder; it exists.
        clock: seconds since 1970.
        purge_step: int; marks as void what older files in the folder hold from this step on. Not every reader
            obeys the mark: `take_out` and `rewind` come first.

    Example:
        >>> import tempfile, time
        >>> file = EventFile(pathlib.Path(tempfile.mkdtemp()), time.time, None)
        >>> file.append(1, [Summary.Value(tag="train/loss", simple_value=0.5)])
        >>> file.close()
    """

    def __init__(self, logdir: pathlib.Path, clock: Clock, purge_step: int | None) -> None:
        self._clock = clock
        self._file = _new_file(logdir, clock())
        self._write(Event(wall_time=clock(), file_version="brain.Event:2"))
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            mark = Event(wall_time=clock(), step=purge_step, session_log=start)
            # TensorBoard takes the first mark in a folder for the start of the run and obeys from the second
            # on. Its fast loader ignores them all.
            self._write(mark)
            self._write(mark)

    def append(self, step: int, values: list[Summary.Value]) -> None:
        """Writes the values of one step as one event.

        Args:
            step: updates completed.
            values: one for each name.

        Raises:
            Unwritable: they are too large for an event.
            OSError: the system refused it.
        """
        self._write(Event(wall_time=self._clock(), step=step, summary=Summary(value=values)))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, event: Event) -> None:
        try:
            data = event.SerializeToString()
        except EncodeError:  # of more than 2 GB
            data = None
        if data is None or len(data) > MOST:
            raise Unwritable(f"not written: an event of more than {MOST >> 20} MiB")
        self._file.append(framed(data))


def _new_file(logdir: pathlib.Path, now: float) -> RecordFile:
    # TensorBoard reads the files of a folder in the order of their names: time comes first.
    microseconds = round(now * 1e6)
    while True:
        seconds, rest = divmod(microseconds, 1_000_000)
        name = f"events.out.tfevents.{seconds:010d}.{rest:06d}.{socket.gethostname()}.{os.getpid()}{_SUFFIX}"
        try:
            return RecordFile(logdir / name, exclusive=True)
        except (FileExistsError, NotRegular):
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

    names, lengths = set(names), {len(name) for name in names}

    def kept(value: Summary.Value) -> bool:
        tag = value.tag
        return any(tag[:length] in names and tag[length : length + 1] in ("", "/") for length in lengths)

    def change(event: Event) -> Event | None:
        if not event.HasField("summary") or event.step < step:
            return event
        values = [value for value in event.summary.value if event.step == step and kept(value)]
        if len(values) == len(event.summary.value):
            return event
        return Event(wall_time=event.wall_time, step=step, summary=Summary(value=values)) if values else None

    changed = [_rewrite(path, change) for path in _files(logdir)]
    return any(changed)


def take_out(logdir: pathlib.Path, purge_step: int) -> None:
    """Takes the values from a step on out of the files of earlier writers in a folder; other programs' files stay."""

    def change(event: Event) -> Event | None:
        return event if event.step < purge_step or not event.HasField("summary") else None

    for path in _files(logdir):
        _rewrite(path, change)


def _files(logdir: pathlib.Path) -> list[pathlib.Path]:
    return sorted(logdir.glob(f"*tfevents*{_SUFFIX}"))


def _rewrite(path: pathlib.Path, change: Callable[[Event], Event | None]) -> bool:
    """Puts what `change` makes of each event into a file, and says whether that is anything else.

    What is damaged is taken out and told. What is no file is left alone, and told.
    """
    try:
        descriptor = open_regular(path)
    except NotRegular as error:
        _LOG.warning("%s Until then TensorBoard may show values in it that were taken back.", error)
        return True
    with open(descriptor, "rb") as file:
        edit, changed, kept, damaged, end = Edit(), False, 0, 0, 0
        for start, end, data in records(file):
            event = None if data is None else _event(data)
            new = None if event is None else change(event)
            damaged += event is None
            changed |= new is not event
            if new is not None:
                kept += 1
                edit.keep(start, end) if new is event else edit.put(framed(new.SerializeToString()))
        cut = os.fstat(file.fileno()).st_size - end
        if damaged or cut:
            _LOG.warning(
                "%s is damaged: %d events and the last %d bytes can't be read and are taken out; %d events stay.",
                path,
                damaged,
                cut,
                kept,
            )
        changed |= bool(damaged or cut)
        if changed:
            edit.apply(file, path)
    return changed


def _event(data: bytes) -> Event | None:
    """Returns an event from its data, None where they are none."""
    try:
        return Event.FromString(data)
    except DecodeError:
        return None
