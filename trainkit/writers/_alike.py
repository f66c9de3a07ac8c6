"""`AlikeWriter`: a writer that treats all kinds of values alike. Owns the methods of the interface; writes nothing."""

import abc
from collections.abc import Mapping
from typing import Any, Literal

from trainkit._core.typing import Array
from trainkit.writers._writer import MetricWriter, Scalar

Kind = Literal["summaries", "scalars", "images", "videos", "audios", "texts", "histograms", "pointcloud"]
"""What `write_...` is called with, by the name of the method."""


class AlikeWriter(MetricWriter):
    """Hands every kind of value to the one method `_write`, which a subclass defines, beside `write_hparams`.

    A kind that a subclass treats in a way of its own it overrides, as any method.

    Example:
        >>> class Names(AlikeWriter):
        ...     def _write(self, kind, step, values, *args, **kwargs):
        ...         print(step, kind, *values)
        ...     def write_hparams(self, hparams): ...
        ...     def flush(self): ...
        ...     def close(self): ...
        >>> Names().write_texts(10, {"note": "hello"})
        10 texts note
    """

    @abc.abstractmethod
    def _write(self, kind: Kind, step: int, values: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Writes values of one kind.

        Args:
            kind: the method that was called is `write_<kind>`.
            step: updates completed.
            values: by name, as that method takes them.
            *args: what else it was given, in its order; keyword-only arguments are in `kwargs`.
            **kwargs: by name.
        """

    def write_summaries(
        self, step: int, values: Mapping[str, Array], metadata: Mapping[str, Any] | None = None
    ) -> None:
        self._write("summaries", step, values, metadata)

    def write_scalars(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        self._write("scalars", step, scalars)

    def write_images(self, step: int, images: Mapping[str, Array]) -> None:
        self._write("images", step, images)

    def write_videos(self, step: int, videos: Mapping[str, Array]) -> None:
        self._write("videos", step, videos)

    def write_audios(self, step: int, audios: Mapping[str, Array], *, sample_rate: int) -> None:
        self._write("audios", step, audios, sample_rate=sample_rate)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        self._write("texts", step, texts)

    def write_histograms(
        self, step: int, arrays: Mapping[str, Array], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        self._write("histograms", step, arrays, num_buckets)

    def write_pointcloud(
        self,
        step: int,
        point_clouds: Mapping[str, Array],
        *,
        point_colors: Mapping[str, Array] | None = None,
        configs: Mapping[str, Any] | None = None,
    ) -> None:
        self._write("pointcloud", step, point_clouds, point_colors=point_colors, configs=configs)
