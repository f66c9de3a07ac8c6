"""The writer that writes nothing: what stands in where there is no log."""

from collections.abc import Mapping
from typing import Any

from trainkit._core.typing import Array
from trainkit.writers._writer import MetricWriter, Scalar


class NullWriter(MetricWriter):
    """Takes everything and keeps nothing.

    Example:
        >>> NullWriter().write_scalars(1, {"train/loss": 0.5})
    """

    def write_summaries(
        self, step: int, values: Mapping[str, Array], metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Writes nothing."""

    def write_scalars(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        """Writes nothing."""

    def write_images(self, step: int, images: Mapping[str, Array]) -> None:
        """Writes nothing."""

    def write_videos(self, step: int, videos: Mapping[str, Array]) -> None:
        """Writes nothing."""

    def write_audios(self, step: int, audios: Mapping[str, Array], *, sample_rate: int) -> None:
        """Writes nothing."""

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes nothing."""

    def write_histograms(
        self, step: int, arrays: Mapping[str, Array], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        """Writes nothing."""

    def write_pointcloud(
        self,
        step: int,
        point_clouds: Mapping[str, Array],
        *,
        point_colors: Mapping[str, Array] | None = None,
        configs: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes nothing."""

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes nothing."""

    def flush(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""
