"""`Figure`: drawings of matplotlib in the log. Owns how a figure becomes pixels, and that it is closed."""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from trainkit._core.cadence import Cadence
from trainkit.callbacks._info import Info
from trainkit.callbacks._shown import EVERY_EPOCH, Shown


class Figure(Shown[Any]):
    """Calls `fn(info)` at its cadence, writes the matplotlib figure it returns as an image, and closes it.

    It needs no screen and no backend. `info.apply` and `info.predict` in it use the averaged weights unless told
    otherwise.

    Args:
        fn: returns a `matplotlib.figure.Figure`, or a mapping of tags to figures.
        every: cadence, once an epoch by default.
        name: in the log, "figure" by default; a mapping is written under its tags, or as `name/tag`.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: `fn` is no function, `every` no cadence; during the fit, where `fn` returned no figure.

    Example:
        >>> def curve(info):
        ...     figure, axes = plt.subplots()
        ...     axes.plot(*zip(*info.history["eval/loss"]))
        ...     return figure
        >>> callback = Figure(curve, name="curve")
    """

    word = "figure"

    def __init__(
        self, fn: Callable[[Info], Any], *, every: Cadence = EVERY_EPOCH, name: str | None = None
    ) -> None:
        check_matplotlib("Figure")
        super().__init__(fn, every=every, name=name)

    def _check(self, value: Any, tag: str) -> Any:
        # Whoever made a figure has imported this: there is nothing to import.
        module: Any = sys.modules.get("matplotlib.figure")
        if module is None or not isinstance(value, module.Figure):
            raise TypeError(
                f"Figure: {tag!r} is {type(value).__name__}; fn returns a matplotlib.figure.Figure, or a mapping of "
                "tags to figures. Write `return figure` at its end; of axes it is axes.figure."
            )
        return value

    def _write(self, info: Info, values: Mapping[str, Any]) -> None:
        try:
            pixels = {tag: as_pixels(figure) for tag, figure in values.items()}
        finally:
            for figure in values.values():
                _close(figure)
        info.writer.write_images(info.step, pixels)


def check_matplotlib(callback: str) -> None:
    """Raises ImportError, naming the extra, where matplotlib is missing; imports nothing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            f'{callback} draws with matplotlib, which is missing: pip install "trainkit[media]".'
        )


def as_pixels(figure: Any) -> np.ndarray:
    """Returns a figure as it is drawn, uint8 `[H, W, 3]`, on white where it is transparent."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = np.asarray(canvas.buffer_rgba()).astype(np.float32)
    alpha = drawn[..., 3:] / 255
    return np.rint(drawn[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def _close(figure: Any) -> None:
    # A figure that pyplot has not made it does not know, and does not keep.
    if "matplotlib.pyplot" in sys.modules:
        from matplotlib import pyplot

        pyplot.close(figure)
