"""The interface of every writer: that of `clu.metric_writers.MetricWriter`, method by method.

Declared here because importing CLU's own needs TensorFlow. Owns shapes, keyword names and call rules.
"""

import abc
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from trainkit._core.typing import Array

Scalar = int | float | np.number | Array
"""One number on the host or on a device."""


class MetricWriter(abc.ABC):
    """Something that metrics are written to, by step and name.

    One name is written at most once at one step. A value that a writer cannot hold is warned about once and
    left out; it never stops a run. After `close` nothing may be written.

    Example:
        >>> from trainkit.writers import ConsoleWriter
        >>> ConsoleWriter().write_scalars(10, {"train/loss": 0.25})
        [step 10] train/loss=0.25
    """

    @abc.abstractmethod
    def write_summaries(
        self, step: int, values: Mapping[str, Array], metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Writes raw tensors for TensorBoard plugins.

        Args:
            step: updates completed.
            values: tensors of any shape and dtype by name.
            metadata: `SummaryMetadata` by name, as a proto or serialized.
        """

    @abc.abstractmethod
    def write_scalars(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        """Writes numbers.

        Args:
            step: updates completed.
            scalars: numbers, or arrays of one element, by name.
        """

    @abc.abstractmethod
    def write_images(self, step: int, images: Mapping[str, Array]) -> None:
        """Writes images.

        Args:
            step: updates completed.
            images: `[N, H, W, C]` or `[H, W, C]` by name, C 1 or 3; floats in [0, 1] or uint8.
        """

    @abc.abstractmethod
    def write_videos(self, step: int, videos: Mapping[str, Array]) -> None:
        """Writes videos.

        Args:
            step: updates completed.
            videos: `[N, T, H, W, C]` or `[T, H, W, C]` by name, C 1 or 3; floats in [0, 1] or uint8.
        """

    @abc.abstractmethod
    def write_audios(self, step: int, audios: Mapping[str, Array], *, sample_rate: int) -> None:
        """Writes sounds.

        Args:
            step: updates completed.
            audios: `[N, T, C]` by name, floats in [-1, 1].
            sample_rate: samples per second.
        """

    @abc.abstractmethod
    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes texts, which TensorBoard shows as Markdown.

        Args:
            step: updates completed.
            texts: texts by name.
        """

    @abc.abstractmethod
    def write_histograms(
        self, step: int, arrays: Mapping[str, Array], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        """Writes how the elements of arrays are distributed.

        Args:
            step: updates completed.
            arrays: arrays of any shape by name.
            num_buckets: number of buckets by name; the writer chooses where a name is missing.
        """

    @abc.abstractmethod
    def write_pointcloud(
        self,
        step: int,
        point_clouds: Mapping[str, Array],
        *,
        point_colors: Mapping[str, Array] | None = None,
        configs: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes clouds of points.

        Args:
            step: updates completed.
            point_clouds: `[N, 3]` or `[B, N, 3]` coordinates by name.
            point_colors: red, green and blue in 0..255 by the same names and of the same shapes.
            configs: how TensorBoard's viewer (three.js) is set up, by the same names.
        """

    @abc.abstractmethod
    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes the hyperparameters of the run; called once.

        Args:
            hparams: values by name; mappings and sequences within are flattened, with dots in the names.
        """

    def rewind(self, step: int, names: Collection[str]) -> None:  # noqa: B027 (a sink may be unable to)
        """Takes back what was written after `step`, for a run that goes on from there.

        By default does nothing: not every sink can take back.

        Args:
            step: updates completed.
            names: what was written at `step` itself and stays; other names at it are taken back too.
        """

    @abc.abstractmethod
    def flush(self) -> None:
        """Returns when everything written would survive a SIGKILL."""

    @abc.abstractmethod
    def close(self) -> None:
        """Flushes and gives up what the writer holds; a second call does nothing."""
