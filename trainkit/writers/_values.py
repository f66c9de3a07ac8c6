"""From what callers hand to a writer to what can be written, and the one warning where it cannot.

Owns the reading of numbers and arrays; knows no file format.
"""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

_NO_NUMBERS = "OSUTMm"
"""NumPy's kinds that hold no numbers: objects, bytes, strings and times."""

_PLAIN = (bool, int, float, complex, str, bytes, np.ndarray, np.generic)


class Unwritable(Exception):
    """A value that a writer cannot hold; the message says why, in words that do not vary with the value."""


class Complaints:
    """Warns once for each kind of value and reason.

    Args:
        writer: name of the writer, for the message.
    """

    def __init__(self, writer: str) -> None:
        self._writer = writer
        self._made: set[tuple[str, str]] = set()

    def once(self, kind: str, name: str, reason: str) -> None:
        """Warns that a value of this kind was not, or not wholly, written, unless that was said before.

        Args:
            kind: what the value is, e.g. "image".
            name: its name in the log.
            reason: why; the same words for every value it happens to.
        """
        if (kind, reason) in self._made:
            return
        self._made.add((kind, reason))
        message = f"{self._writer}: {kind} {name!r}: {reason} (said once for each kind and reason)"
        warnings.warn(message, stacklevel=4)


def as_number(value: Any) -> int | float:
    """Returns a scalar, on the host or a device, as Python's int (also for bools) or float.

    Raises:
        Unwritable: it is not exactly one real number.
    """
    if type(value) is float or type(value) is int:
        return value
    array = as_array(value)
    if array.size != 1:
        raise Unwritable("not written: it is not one number; reduce it first or write a histogram")
    if array.dtype.kind == "c":
        raise Unwritable("not written: it is complex; write its real and imaginary parts")
    item = array.reshape(()).item()
    return int(item) if isinstance(item, int) else float(item)


def as_array(value: Any) -> np.ndarray:
    """Returns an array-like of numbers, on the host or a device, as a NumPy array.

    Raises:
        Unwritable: it holds something else than numbers.
    """
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        raise Unwritable("not written: it cannot be read as an array of numbers") from None
    if array.dtype.kind in _NO_NUMBERS:
        raise Unwritable("not written: it does not hold numbers")
    if array.dtype.kind == "V":
        # The kind of bfloat16 and the 8-bit floats, which float32 holds exactly.
        try:
            return array.astype(np.float32)
        except (TypeError, ValueError):
            raise Unwritable("not written: it does not hold numbers") from None
    return array


def on_host(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values with the device's arrays fetched, so that several writers share one transfer.

    An error of the device, or a donated array, is raised here: it is the caller's, not a writer's.
    """
    return {name: _fetched(value) for name, value in values.items()}


def _fetched(value: Any) -> Any:
    if isinstance(value, _PLAIN) or not hasattr(value, "__array__"):
        return value
    try:
        return np.asarray(value)
    except (TypeError, ValueError):
        return value


def describe(value: Any) -> dict[str, Any]:
    """Returns the shape and dtype of an array-like, for logs that cannot hold its values."""
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        value = np.asarray(value)
    return {"shape": list(value.shape), "dtype": str(value.dtype)}


def flat_hparams(hparams: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Returns hyperparameters as plain values, nested names joined with dots.

    None becomes the empty string, as in CLU; what is no plain value becomes its text.
    """
    return dict(_flat_items(hparams, ""))


def _flat_items(values: Any, prefix: str) -> Iterator[tuple[str, bool | int | float | str]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        # ml_collections.ConfigDict is a mapping in all but type.
        if isinstance(value, Mapping) or hasattr(value, "items"):
            yield from _flat_items(value, f"{name}.")
        elif isinstance(value, list | tuple):
            yield from _flat_items(dict(enumerate(value)), f"{name}.")
        else:
            yield name, _plain(value)


def _plain(value: Any) -> bool | int | float | str:
    if isinstance(value, bool | int | float | str):
        return value
    if value is None:
        return ""
    if isinstance(value, np.bool_):
        return bool(value)
    if hasattr(value, "__array__"):
        try:
            return as_number(value)
        except Unwritable:
            return str(value)
    return getattr(value, "__name__", None) or str(value)
