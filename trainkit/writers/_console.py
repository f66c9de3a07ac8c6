"""The writer of plain lines for people. Owns how a value looks in a terminal."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

from trainkit.writers._alike import AlikeWriter, Kind
from trainkit.writers._values import Unwritable, as_number, describe, flat_hparams
from trainkit.writers._writer import Scalar

_ONE_OF: Mapping[Kind, str] = {
    "summaries": "tensor",
    "images": "image",
    "videos": "video",
    "audios": "audio",
    "histograms": "histogram",
    "pointcloud": "point cloud",
}
"""What a line calls one array of a kind."""


class ConsoleWriter(AlikeWriter):
    """Writes a line for each call: numbers and texts as they are, arrays as shape and dtype.

    Args:
        stream: where to; None is the standard output at the time of the call.

    Example:
        >>> ConsoleWriter().write_scalars(10, {"train/loss": 0.25, "epoch": 1})
        [step 10] train/loss=0.25, epoch=1
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def write_scalars(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        """Prints numbers to six digits."""
        self._line(step, (f"{name}={_number(value)}" for name, value in scalars.items()))

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Prints texts."""
        self._line(step, (f"{name}: {text}" for name, text in texts.items()))

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Prints the hyperparameters."""
        items = (f"{name}={value}" for name, value in flat_hparams(hparams).items())
        self._print(f"[hparams] {', '.join(items)}")

    def flush(self) -> None:
        """Flushes the stream."""
        (self._stream or sys.stdout).flush()

    def close(self) -> None:
        """Flushes the stream, which stays open: it is the caller's."""
        self.flush()

    def _write(self, kind: Kind, step: int, values: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Prints the shapes and dtypes of arrays."""
        one = _ONE_OF[kind]
        self._line(step, (f"{name}: {one} {_sketch(value)}" for name, value in values.items()))

    def _line(self, step: int, items: Iterable[str]) -> None:
        line = ", ".join(items)
        if line:
            self._print(f"[step {int(step)}] {line}")

    def _print(self, line: str) -> None:
        print(line, file=self._stream or sys.stdout)


def _number(value: Any) -> str:
    try:
        number = as_number(value)
    except Unwritable:
        return str(value)
    return str(number) if isinstance(number, int) else f"{number:.6g}"


def _sketch(value: Any) -> str:
    described = describe(value)
    return f"{described['dtype']}{described['shape']}"
