"""The fan-out to several writers. Owns what happens when one of them fails."""

import contextlib
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from trainkit._core.typing import Array
from trainkit.writers._values import on_host
from trainkit.writers._writer import MetricWriter, Scalar

_OPTIONAL = frozenset({"write_pointcloud"})
"""Methods that released CLU writers do not have yet."""


class MultiWriter(MetricWriter):
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

    def write_summaries(
        self, step: int, values: Mapping[str, Array], metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Hands on raw tensors."""
        self._each("write_summaries", step, on_host(values), metadata)

    def write_scalars(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        """Hands on numbers."""
        self._each("write_scalars", step, on_host(scalars))

    def write_images(self, step: int, images: Mapping[str, Array]) -> None:
        """Hands on images."""
        self._each("write_images", step, on_host(images))

    def write_videos(self, step: int, videos: Mapping[str, Array]) -> None:
        """Hands on videos."""
        self._each("write_videos", step, on_host(videos))

    def write_audios(self, step: int, audios: Mapping[str, Array], *, sample_rate: int) -> None:
        """Hands on sounds."""
        self._each("write_audios", step, on_host(audios), sample_rate=sample_rate)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Hands on texts."""
        self._each("write_texts", step, texts)

    def write_histograms(
        self, step: int, arrays: Mapping[str, Array], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        """Hands on arrays to be summarised."""
        self._each("write_histograms", step, on_host(arrays), num_buckets)

    def write_pointcloud(
        self,
        step: int,
        point_clouds: Mapping[str, Array],
        *,
        point_colors: Mapping[str, Array] | None = None,
        configs: Mapping[str, Any] | None = None,
    ) -> None:
        """Hands on clouds of points."""
        colors = None if point_colors is None else on_host(point_colors)
        clouds = on_host(point_clouds)
        self._each("write_pointcloud", step, clouds, point_colors=colors, configs=configs)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Hands on the hyperparameters."""
        self._each("write_hparams", hparams)

    def rewind(self, step: int, names: Collection[str]) -> None:
        """Takes back from every writer that can; raises what they raise, since the log would be wrong for good."""
        for index, writer in enumerate(self._writers):
            if index not in self._failed and hasattr(writer, "rewind"):  # CLU's writers know no way back
                writer.rewind(step, names)

    def flush(self) -> None:
        """Flushes every writer."""
        self._each("flush")

    def close(self) -> None:
        """Closes every writer, also those left out, whose errors were told before."""
        messages: list[str] = []
        with contextlib.ExitStack() as stack:
            # A stack, since an interrupt in one must not leave the others open; it runs in reverse.
            for index in reversed(range(len(self._writers))):
                stack.callback(self._call, index, "close", messages)
        _warn(messages)

    def _each(self, method: str, *args: Any, **kwargs: Any) -> None:
        messages: list[str] = []
        for index in range(len(self._writers)):
            if index not in self._failed and (index, method) not in self._refused:
                self._call(index, method, messages, *args, **kwargs)
        # After the loop: where warnings are errors, every writer has had the values all the same.
        _warn(messages)

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


def _warn(messages: list[str]) -> None:
    for message in messages:
        warnings.warn(message, stacklevel=4)
