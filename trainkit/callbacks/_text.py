"""`Text`: words that a function makes of the model, in the log."""

from collections.abc import Callable, Mapping
from typing import Any

from trainkit._core.cadence import Cadence
from trainkit.callbacks._info import Info
from trainkit.callbacks._shown import EVERY_EPOCH, Shown


class Text(Shown[str]):
    """Calls `fn(info)` at its cadence and writes the text it returns, at `info.step`.

    TensorBoard shows it as Markdown. `info.apply` and `info.predict` in it use the averaged weights unless told
    otherwise.

    Args:
        fn: returns a string, or a mapping of tags to strings.
        every: cadence, once an epoch by default.
        name: in the log, "text" by default; a mapping is written under its tags, or as `name/tag`.

    Raises:
        TypeError: `fn` is no function, `every` no cadence; during the fit, where `fn` returned something else.

    Example:
        >>> callback = Text(lambda info: f"epoch **{info.epoch}**", name="note")
    """

    word = "text"

    def __init__(
        self, fn: Callable[[Info], Any], *, every: Cadence = EVERY_EPOCH, name: str | None = None
    ) -> None:
        super().__init__(fn, every=every, name=name)

    def _check(self, value: Any, tag: str) -> str:
        if not isinstance(value, str):
            raise TypeError(
                f"Text: {tag!r} is {type(value).__name__}; fn returns a string, or a mapping of tags to strings. Lines "
                "are joined by '\\n\\n'.join(lines)."
            )
        return value

    def _write(self, info: Info, values: Mapping[str, str]) -> None:
        info.writer.write_texts(info.step, values)
