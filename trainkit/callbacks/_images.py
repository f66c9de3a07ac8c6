"""`Images`: pictures that a function makes of the model, in the log."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from trainkit._core.cadence import Cadence
from trainkit.callbacks._info import Info
from trainkit.callbacks._shown import EVERY_EPOCH, Shown

_ALLOWED = (
    "fn returns an array [H, W, C] or [N, H, W, C] with C 1, 3 or 4, floats in [0, 1] or uint8, or a mapping of tags "
    "to such arrays"
)


class Images(Shown[np.ndarray]):
    """Calls `fn(info)` at its cadence and writes the images it returns, at `info.step`.

    `info.apply` and `info.predict` in it use the averaged weights unless told otherwise.

    Args:
        fn: returns `[H, W, C]` or `[N, H, W, C]`, C 1, 3 or 4, floats in [0, 1] or uint8; or a mapping of tags to that.
        every: cadence, once an epoch by default.
        name: in the log, "images" by default; a mapping is written under its tags, or as `name/tag`.

    Raises:
        TypeError: `fn` is no function, `every` no cadence; during the fit, where `fn` returned no array.
        ValueError: during the fit, where its shape is none of these.

    Example:
        >>> import trainkit as tk
        >>> def samples(info):
        ...     return info.apply(decode, noise, rng=0)
        >>> callback = Images(samples, every=tk.Every(epochs=5), name="samples")
    """

    word = "images"

    def __init__(
        self, fn: Callable[[Info], Any], *, every: Cadence = EVERY_EPOCH, name: str | None = None
    ) -> None:
        super().__init__(fn, every=every, name=name)

    def _check(self, value: Any, tag: str) -> np.ndarray:
        return check_images("Images", value, tag, _ALLOWED)

    def _write(self, info: Info, values: Mapping[str, np.ndarray]) -> None:
        info.writer.write_images(info.step, values)


def check_images(callback: str, value: Any, tag: str, allowed: str) -> np.ndarray:
    """Returns images on the host, refusing what is none; `allowed` says what may be returned."""
    if value is None or isinstance(value, str) or (array := np.asarray(value)).dtype.kind in "OSUMm":
        raise TypeError(f"{callback}: {tag!r} is {type(value).__name__}; {allowed}.")
    if array.ndim not in (3, 4) or array.shape[-1] not in (1, 3, 4) or not array.size:
        raise ValueError(
            f"{callback}: {tag!r} has the shape {list(array.shape)}; {allowed}. Grey images get their axis by "
            "images[..., None]."
        )
    return array
