"""Reads IDX files, the format of MNIST and its relatives.

Owns the parsing. Does not download or cache anything.
"""

import gzip
import io
import math
import os
import struct
import zlib

import numpy as np

from trainkit._core.files import read_regular

_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_GZIP = b"\x1f\x8b"
_LONGEST_HEADER = 4 + 4 * 255
# No gzip file unpacks to more times its size.
_MOST_PACKED = 1100


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """Returns the array in an IDX file, plain or gzipped.

    The format: two zero bytes, a byte for the dtype, a byte for the number of dimensions, each dimension as a
    big-endian uint32, then the values in big-endian order (http://yann.lecun.com/exdb/mnist/).

    Args:
        path: the file; gzip is told by its content.

    Returns:
        A new array in the byte order of this machine, e.g. uint8 `[10000, 28, 28]` for MNIST images.

    Raises:
        ValueError: the file is not IDX, is truncated, or has bytes to spare.
        OSError: there is no file, or something else than one.
    """
    content = _content(path)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _DTYPES:
        codes = ", ".join(f"{code:02x}" for code in _DTYPES)
        raise ValueError(
            f"{path} is not an IDX file: it begins with {content[:4].hex(' ') or 'nothing'}. Two zero bytes, "
            f"a dtype ({codes}) and the number of dimensions are expected."
        )
    dtype, rank = np.dtype(_DTYPES[content[2]]), content[3]
    header = 4 + 4 * rank
    if len(content) < header:
        raise ValueError(f"{path} is truncated: its header needs {header} bytes and it has {len(content)}.")
    shape = struct.unpack(f">{rank}I", content[4:header])
    wanted = _needed(content) - header
    if len(content) - header != wanted:
        state = "truncated" if len(content) - header < wanted else "too long"
        raise ValueError(
            f"{path} is {state}: {dtype.name}{list(shape)} needs {wanted} bytes after the header and there "
            f"are {len(content) - header}. Fetch the file again."
        )
    values = np.frombuffer(content, dtype, offset=header)
    return values.reshape(shape).astype(dtype.newbyteorder("="))


def _content(path: str | os.PathLike[str]) -> bytes:
    content = read_regular(os.path.realpath(path))
    if content[:2] != _GZIP:
        return content
    try:
        with gzip.open(io.BytesIO(content)) as file:
            start = file.read(_LONGEST_HEADER)
            # One byte more than the header asks for tells whether there is more; all of it might be without end.
            rest = _needed(start) + 1 - len(start)
            return start + file.read(min(max(rest, 0), _MOST_PACKED * len(content)))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is a truncated or damaged gzip file: {error}. Fetch it again.") from error


def _needed(content: bytes) -> int:
    """Returns how many bytes a file has that begins like this; 0 where it is none of ours."""
    if len(content) < 4 or content[2] not in _DTYPES or len(content) < 4 + 4 * content[3]:
        return 0
    # Python's integers: a damaged header can claim more than 64 bits hold.
    shape = struct.unpack_from(f">{content[3]}I", content, 4)
    return 4 + 4 * content[3] + math.prod(shape) * np.dtype(_DTYPES[content[2]]).itemsize
