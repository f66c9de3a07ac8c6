"""`Embedding`: vectors for TensorBoard's projector. Owns what they may be; their files are the writers'."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from trainkit._core.cadence import Cadence
from trainkit.callbacks._images import check_images
from trainkit.callbacks._info import Info
from trainkit.callbacks._shown import EVERY_EPOCH, Shown
from trainkit.writers._projector import remove_embeddings, write_embedding

_LOGGER = logging.getLogger("trainkit")
_RETURNS = (
    "fn returns (vectors, labels) or (vectors, labels, images): vectors [N, D], labels a list of N or a mapping of "
    "columns to such lists or None, images [N, H, W, C], floats in [0, 1] or uint8"
)


class Vectors(NamedTuple):
    """What is shown of one embedding.

    Attributes:
        vectors: float32 `[N, D]`.
        columns: N labels each, by name of the column.
        pixels: uint8 `[N, H, W, 3]`, None where there are none.
    """

    vectors: np.ndarray
    columns: dict[str, list[str]]
    pixels: np.ndarray | None


class Embedding(Shown[Vectors]):
    """Calls `fn(info)` at its cadence and writes the vectors it returns for TensorBoard's projector.

    They lie below the log folder, one folder a step, and are listed in its `projector_config.pbtxt`, which
    TensorBoard reads when it starts; each is shown as `name:<step>`. Without a `logdir` nothing is called or written,
    and said so once. `info.apply` and `info.predict` in `fn` use the averaged weights unless told otherwise.

    Args:
        fn: returns `(vectors, labels)` or `(vectors, labels, images)`, or a mapping of tags to that: vectors
            `[N, D]`; labels a list of N strings or numbers, a mapping of columns to such lists, or None; images
            `[N, H, W, C]`, floats in [0, 1] or uint8, which the points are drawn as.
        every: cadence, once an epoch by default.
        name: in the projector, "embedding" by default; a mapping is written under its tags, or as `name/tag`.

    Raises:
        TypeError: `fn` is no function, `every` no cadence; during the fit, where `fn` returned something else.
        ValueError: during the fit, where the numbers of vectors, labels and images differ, or a shape is wrong.

    Example:
        >>> def digits(info):
        ...     return info.apply(encode, images), labels, images
        >>> callback = Embedding(digits, name="digits")
    """

    word = "embedding"

    def __init__(
        self, fn: Callable[[Info], Any], *, every: Cadence = EVERY_EPOCH, name: str | None = None
    ) -> None:
        super().__init__(fn, every=every, name=name)
        self._said: set[str] = set()

    def on_fit_start(self, info: Info) -> None:
        if info.logdir is None:
            self._say("Embedding writes nothing: it needs a folder, Trainer(logdir=...).")
        elif jax.process_index() == 0:
            # A run that goes on from here writes those anew.
            remove_embeddings(info.logdir, after=info.step)

    def on_step(self, info: Info) -> None:
        if info.logdir is not None:
            super().on_step(info)

    def _check(self, value: Any, tag: str) -> Vectors:
        if not isinstance(value, tuple | list) or len(value) not in (2, 3):
            raise TypeError(f"Embedding: {tag!r} is {_described(value)}; {_RETURNS}.")
        vectors = np.asarray(value[0])
        if vectors.dtype.kind in "OSUMmc" or vectors.ndim != 2 or not vectors.size:
            raise ValueError(
                f"Embedding: the vectors of {tag!r} have the shape {list(vectors.shape)} and dtype {vectors.dtype}; "
                f"{_RETURNS}."
            )
        vectors = vectors.astype(np.float32)
        if not np.isfinite(vectors).all():
            self._say(f"Embedding: the vectors of {tag!r} are not all finite; what is not is shown as 0.")
            vectors = np.where(np.isfinite(vectors), vectors, np.float32(0))
        columns = _columns(tag, value[1])
        images = value[2] if len(value) == 3 else None
        pixels = None if images is None else _pixels(tag, images)
        sizes = {name or "labels": len(column) for name, column in columns.items()}
        sizes |= {} if pixels is None else {"images": len(pixels)}
        for name, size in sizes.items():
            if size != len(vectors):
                raise ValueError(
                    f"Embedding: {tag!r} has {len(vectors)} vectors and {size} {name}; give one for each."
                )
        return Vectors(vectors, columns, pixels)

    def _write(self, info: Info, values: Mapping[str, Vectors]) -> None:
        if jax.process_index() == 0:
            assert info.logdir is not None
            for tag, shown in values.items():
                write_embedding(info.logdir, tag, info.step, *shown)

    def _say(self, words: str) -> None:
        if words not in self._said:
            self._said.add(words)
            _LOGGER.warning(words)


def _described(value: Any) -> str:
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, tuple | list) else "")


def _columns(tag: str, labels: Any) -> dict[str, list[str]]:
    """Returns labels by name of their column, a single list under the name ''."""
    if labels is None:
        return {}
    columns = dict(labels) if isinstance(labels, Mapping) else {"": labels}
    found = {}
    for name, column in columns.items():
        if isinstance(column, str) or not hasattr(column, "__len__") or np.ndim(column) > 1:
            raise TypeError(f"Embedding: the labels of {tag!r} are {_described(column)}; {_RETURNS}.")
        found[str(name)] = [
            str(label) for label in (np.asarray(column).tolist() if _is_array(column) else column)
        ]
    return found


def _is_array(value: Any) -> bool:
    return hasattr(value, "__array__")


def _pixels(tag: str, images: Any) -> np.ndarray:
    """Returns images as uint8 `[N, H, W, 3]`."""
    array = check_images("Embedding", images, tag, _RETURNS)
    if array.ndim != 4:
        raise ValueError(f"Embedding: the images of {tag!r} have the shape {list(array.shape)}; {_RETURNS}.")
    if array.dtype.kind in "fV":
        array = np.rint(np.nan_to_num(array.astype(np.float32)).clip(0, 1) * 255)
    elif array.dtype.kind == "b":
        array = array * np.uint8(255)
    array = array.clip(0, 255).astype(np.uint8)[..., :3]
    return np.broadcast_to(array, (*array.shape[:-1], 3))
