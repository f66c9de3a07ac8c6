"""Arrays from the bytes of a file that others may have changed. Knows no format."""

import math
import reprlib
import sys
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

_MOST_DIMENSIONS = 64  # NumPy's


def dtype_of(name: Any) -> np.dtype:
    """Returns the dtype that `str` gave a name: of numbers or bools.

    Raises:
        ValueError: there is none of that name.
    """
    try:
        dtype = jnp.dtype(name) if isinstance(name, str) else None
    except (TypeError, ValueError, SyntaxError):
        dtype = None
    # Structures, and arrays within an element, have other names than those they may be asked for by.
    if dtype is None or str(dtype) != name or dtype.kind in "OUSMm" or dtype.fields:
        raise ValueError(f"{reprlib.repr(name)} is no dtype of numbers")
    return dtype


def shape_of(value: Any) -> tuple[int, ...]:
    """Returns `value` as the shape of an array.

    Raises:
        ValueError: no array has it.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or len(value) > _MOST_DIMENSIONS:
        raise ValueError(f"{reprlib.repr(value)} is no shape")
    if not all(type(size) is int and size >= 0 for size in value):
        raise ValueError(f"{reprlib.repr(value)} is no shape")
    if math.prod(max(size, 1) for size in value) > sys.maxsize >> 4:
        raise ValueError(f"no array has the shape {reprlib.repr(value)}")
    return tuple(value)


def array_of(data: bytes | bytearray, dtype: np.dtype, shape: Any) -> np.ndarray:
    """Returns the array whose bytes are `data`; it shares their memory.

    Args:
        data: the elements in C order.
        dtype: of one.
        shape: `[...]`, as it was read.

    Raises:
        ValueError: it is no shape, or needs another number of bytes.
    """
    shape = shape_of(shape)
    needed = math.prod(shape) * dtype.itemsize
    if needed != len(data):
        raise ValueError(f"{dtype}{list(shape)} needs {needed} bytes, and there are {len(data)}")
    return np.frombuffer(data, dtype).reshape(shape)
