"""The fan-out to several writers. Owns what happens when one of them fails."""

import contextlib
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from trainkit.writers._alike import AlikeWriter, Kind
from trainkit.writers._values import on_host
from trainkit.writers._writer import MetricWriter

_OPTIONAL = frozenset({"write_pointcloud"})
"""Methods that released CLU writers do not have yet."""


class MultiWriter(AlikeWriter):
    """Hands everything to several writers, ours or CLU's; a failing one is left out and the others go on.

    The first exception of a writer is warned about, with the writer, the method and the error, and the
    writer gets nothing more until it is closed. A kind that a writer does not do (`NotImplementedError`, or
    the method is missing) is warned about, and the writer stays. KeyboardInterrupt and SystemExit pass
    through. Arrays are fetched from the device once for all; an error in that is the caller's, and raised.

    Args:
        *writers: each a `MetricWriter` or a `clu.metric_writers.MetricWriter`.

    Raises:
        TypeError: something given is no writer.

    Example:
        >>> from trainkit.writers import ConsoleWriter, NullWriter
        >>> MultiWriter(ConsoleWriter(), NullWriter()).write_texts(1, {"note": "hello"})
        [step 1] note: hello
    """

    def __init__(self, *writers: MetricWriter) -> None:
        for writer in writers:
            _check(writer)
        self._writers = writers
        self._failed: set[int] = set()
        self._refused: set[tuple[int, str]] = set()

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Hands on the hyperparameters."""
        _warn(self._each("write_hparams", hparams), stacklevel=3)

    def rewind(self, step: int, names: Collection[str]) -> None:
        """Takes back from every writer that can; raises what they raise, since the log would be wrong for good."""
        for index, writer in enumerate(self._writers):
            if index not in self._failed and hasattr(writer, "rewind"):  # CLU's writers know no way back
                writer.rewind(step, names)

    def flush(self) -> None:
        """Flushes every writer."""
        _warn(self._each("flush"), stacklevel=3)

    def close(self) -> None:
        """Closes every writer, also those left out, whose errors were told before."""
        messages: list[str] = []
        with contextlib.ExitStack() as stack:
            # A stack, since an interrupt in one must not leave the others open; it runs in reverse.
            for index in reversed(range(len(self._writers))):
                stack.callback(self._call, index, "close", messages)
        _warn(messages, stacklevel=3)

    def _write(self, kind: Kind, step: int, values: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Hands on values of any kind."""
        if kind == "pointcloud" and kwargs["point_colors"] is not None:
            kwargs["point_colors"] = on_host(kwargs["point_colors"])
        _warn(self._each(f"write_{kind}", step, on_host(values), *args, **kwargs), stacklevel=4)

    def _each(self, method: str, *args: Any, **kwargs: Any) -> list[str]:
        """Calls a method of every writer that has not failed, and returns what is to be warned about."""
        messages: list[str] = []
        for index in range(len(self._writers)):
            if index not in self._failed and (index, method) not in self._refused:
                self._call(index, method, messages, *args, **kwargs)
        # Not warned about here: where warnings are errors, every writer has the values all the same.
        return messages

    def _call(self, index: int, method: str, messages: list[str], *args: Any, **kwargs: Any) -> None:
        writer = self._writers[index]
        name = type(writer).__name__
        try:
            if method in _OPTIONAL and not hasattr(writer, method):
                raise NotImplementedError(f"it has no {method}")
            getattr(writer, method)(*args, **kwargs)
        except NotImplementedError as error:
            self._refused.add((index, method))
            messages.append(
                f"{name}.{method} is not supported and left out: {error or 'NotImplementedError'}"
            )
        except Exception as error:
            if index not in self._failed:
                self._failed.add(index)
                messages.append(
                    f"{name}.{method} failed with {type(error).__name__}: {error}. "
                    "This writer gets nothing more in this run; the others go on."
                )


def _check(writer: Any) -> None:
    required = MetricWriter.__abstractmethods__ - _OPTIONAL
    missing = sorted(name for name in required if not callable(getattr(writer, name, None)))
    if missing:
        raise TypeError(
            f"MultiWriter takes writers with the methods of MetricWriter; got {writer!r}, which lacks "
            f"{', '.join(missing)}. Pass each writer as an argument of its own."
        )


def _warn(messages: list[str], stacklevel: int) -> None:
    for message in messages:
        warnings.warn(message, stacklevel=stacklevel)
