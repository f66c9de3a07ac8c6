"""TFRecord, the framing of event files: length, its checksum, the data, its checksum, all little-endian.

Owns what is believed of a file that others may have changed. Knows no events.
"""

import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

from trainkit.writers._checksum import masked

MOST = 1 << 27
"""Bytes of the longest record that is written or read."""

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
_FRAME = _HEADER.size + _FOOTER.size


def framed(data: bytes) -> bytes:
    """Returns the record that holds `data`."""
    length = struct.pack("<Q", len(data))
    return length + _FOOTER.pack(masked(length)) + data + _FOOTER.pack(masked(data))


def records(file: BinaryIO) -> Iterator[tuple[int, int, bytes | None]]:
    """Yields where each record begins and ends, and its data: None where they are damaged or more than `MOST` bytes.

    It ends at the first record whose length is damaged or that is cut short: where the next one would begin is not
    known. One record is held at a time, and nothing is read for a length that the file does not have.
    """
    size, start = os.fstat(file.fileno()).st_size, 0
    while start + _FRAME <= size:
        file.seek(start)
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return
        length, check = _HEADER.unpack(header)
        stop = start + _FRAME + length
        if stop > size or masked(header[:8]) != check:
            return
        yield start, stop, _data(file, length) if length <= MOST else None
        start = stop


def _data(file: BinaryIO, length: int) -> bytes | None:
    data, footer = file.read(length), file.read(_FOOTER.size)
    return data if len(footer) == _FOOTER.size and masked(data) == _FOOTER.unpack(footer)[0] else None
