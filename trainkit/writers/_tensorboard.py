"""The writer of TensorBoard event files. Owns which method makes which summary, and when a file is made."""

import functools
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from trainkit._core.typing import Array, Clock
from trainkit.writers._logdir import claim, release
from trainkit.writers._values import Complaints, Unwritable
from trainkit.writers._writer import MetricWriter, Scalar

if TYPE_CHECKING:
    from trainkit.writers._events import EventFile

_KIND = "TensorBoard"


class TensorBoardWriter(MetricWriter):
    """Writes every kind of value for TensorBoard.

    The folder is made and checked at once; the event file is made by the first write, so a run that logs
    nothing leaves none. Every write is with the operating system when the method returns, so a SIGKILL loses
    nothing. A value that cannot be written is warned about once for its kind and reason, and left out.

    Args:
        logdir: the run's folder, local.
        purge_step: int; what older files in the folder hold from this step on is no longer shown. A run
            resumed after step n passes n + 1.
        clock: seconds since 1970.
        without: names of scalars that get no chart.

    Raises:
        OSError: the folder cannot be made or written to.
        ValueError: the folder has a live TensorBoard writer in this process.

    Example:
        >>> import tempfile
        >>> writer = TensorBoardWriter(tempfile.mkdtemp())
        >>> writer.write_scalars(1, {"train/loss": 0.5})
        >>> writer.close()
    """

    def __init__(
        self,
        logdir: str | os.PathLike[str],
        *,
        purge_step: int | None = None,
        clock: Clock = time.time,
        without: Collection[str] = (),
    ) -> None:
        # tensorboardX takes a while and imports torch where it finds it: not to be paid by `import trainkit`.
        import trainkit.writers._summaries as summaries

        self._summaries = summaries
        self._clock, self._without = clock, frozenset(without)
        self._complaints = Complaints(type(self).__name__)
        self._file: EventFile | None = None
        self._closed = False
        self._logdir = claim(logdir, _KIND, self)
        if purge_step is not None:
            from trainkit.writers._events import take_out

            try:
                take_out(self._logdir, int(purge_step))
                self._file = self._open(int(purge_step))
            except BaseException:
                release(self._logdir, _KIND, self)
                raise

    def write_summaries(
        self, step: int, values: Mapping[str, Array], metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Writes raw tensors; `metadata` may also be one `SummaryMetadata` for all of them."""

        def build(name: str, value: Any) -> Iterable[Any]:
            given = metadata.get(name) if isinstance(metadata, Mapping) else metadata
            return [self._summaries.tensor(name, value, given)]

        self._write(step, "tensor", values, build)

    def write_scalars(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        """Writes numbers, those of one call as one event."""
        shown = {name: value for name, value in scalars.items() if name not in self._without}
        self._write(step, "scalar", shown, lambda name, value: [self._summaries.scalar(name, value)])

    def write_images(self, step: int, images: Mapping[str, Array]) -> None:
        """Writes images as PNG; needs Pillow. N > 1 images are named `name/0`, `name/1`, ..."""
        self._write(step, "image", images, self._noting("image", self._summaries.images))

    def write_videos(self, step: int, videos: Mapping[str, Array]) -> None:
        """Writes videos as animated GIF among the images; needs Pillow. N > 1 are named like images."""
        self._write(step, "video", videos, self._noting("video", self._summaries.videos))

    def write_audios(self, step: int, audios: Mapping[str, Array], *, sample_rate: int) -> None:
        """Writes sounds as WAV. N > 1 are named like images."""
        build = functools.partial(self._summaries.audios, sample_rate=int(sample_rate))
        self._write(step, "audio", audios, self._noting("audio", build))

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes texts, shown as Markdown."""
        self._write(step, "text", texts, lambda name, value: [self._summaries.text(name, value)])

    def write_histograms(
        self, step: int, arrays: Mapping[str, Array], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        """Writes distributions, of 30 buckets where `num_buckets` says nothing."""
        buckets = num_buckets or {}

        def build(name: str, value: Any, note: Callable[[str], None]) -> Iterable[Any]:
            return [self._summaries.histogram(name, value, buckets.get(name), note)]

        self._write(step, "histogram", arrays, self._noting("histogram", build))

    def write_pointcloud(
        self,
        step: int,
        point_clouds: Mapping[str, Array],
        *,
        point_colors: Mapping[str, Array] | None = None,
        configs: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes clouds of points for the mesh plugin."""
        colors, settings = point_colors or {}, configs or {}

        def build(name: str, value: Any) -> Iterable[Any]:
            return self._summaries.pointcloud(name, value, colors.get(name), settings.get(name))

        self._write(step, "point cloud", point_clouds, build)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes the hyperparameters into this run, beside whose metrics TensorBoard's page shows them."""
        self._append(0, [self._summaries.hparams(hparams)])

    def rewind(self, step: int, names: Collection[str]) -> None:
        """Takes what the folder's files hold after `step` out of them, and at `step` all names but `names`."""
        from trainkit.writers._events import rewind

        if self._file is not None:
            self._file.close()
            self._file = None
        if rewind(self._logdir, step, names):
            self._file = self._open(step + 1)

    def flush(self) -> None:
        """Does nothing: every write has reached the operating system already."""

    def close(self) -> None:
        """Closes the event file and frees the folder."""
        self._closed = True
        release(self._logdir, _KIND, self)
        if self._file is not None:
            self._file.close()

    def _noting(self, kind: str, build: Callable[..., Iterable[Any]]) -> Callable[[str, Any], Iterable[Any]]:
        def noting(name: str, value: Any) -> Iterable[Any]:
            return build(name, value, note=functools.partial(self._complaints.once, kind, name))

        return noting

    def _write(
        self, step: int, kind: str, values: Mapping[str, Any], build: Callable[[str, Any], Iterable[Any]]
    ) -> None:
        built = []
        for name, value in values.items():
            try:
                built.extend(build(name, value))
            except Unwritable as error:
                self._complaints.once(kind, name, str(error))
        if built:
            self._append(int(step), built)

    def _append(self, step: int, values: list[Any]) -> None:
        if self._closed:
            raise ValueError(
                f"{type(self).__name__} for {str(self._logdir)!r} is closed; make a new one to write more."
            )
        if self._file is None:
            self._file = self._open(None)
        try:
            self._file.append(step, values)
        except Unwritable as error:
            self._complaints.once("event", values[0].tag, str(error))

    def _open(self, purge_step: int | None) -> "EventFile":
        from trainkit.writers._events import EventFile

        return EventFile(self._logdir, self._clock, purge_step)
