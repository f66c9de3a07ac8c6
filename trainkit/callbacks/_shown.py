"""`Shown`: a function of the user's that is called where it is due, and what it returned written.

Owns the call and the names in the log; what may be returned is the subclass's affair.
"""

import abc
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, TypeVar

from trainkit._core.cadence import Cadence, Every, as_cadence
from trainkit.callbacks._callback import Callback
from trainkit.callbacks._info import Info

EVERY_EPOCH = Every(epochs=1)

Value = TypeVar("Value")
"""What one name in the log shows."""


class Shown(Callback, abc.ABC, Generic[Value]):
    """Calls `fn(info)` at its cadence and writes what it returns, or a mapping of tags to it, at `info.step`.

    Attributes:
        word: under which name a value is written unless `name=` says otherwise.

    Args:
        fn: `fn(info)`; an empty mapping writes nothing.
        every: cadence.
        name: in the log; before the tags, `name/tag`, of a function that returns a mapping.
    """

    word: ClassVar[str]

    def __init__(self, fn: Callable[[Info], Any], *, every: Cadence, name: str | None) -> None:
        said = type(self).__name__
        if not callable(fn):
            raise TypeError(f"{said}({fn!r}): expected a function, fn(info).")
        check_name(said, name)
        self.every, self._fn, self._name = as_cadence(every, "every", comes=True), fn, name

    @abc.abstractmethod
    def _check(self, value: Any, tag: str) -> Value:
        """Returns what is to be written, refusing what `fn` may not return."""

    @abc.abstractmethod
    def _write(self, info: Info, values: Mapping[str, Value]) -> None:
        """Writes values by name."""

    def on_step(self, info: Info) -> None:
        returned = self._fn(info)
        if isinstance(returned, Mapping):
            tagged = {self._tag(tag): value for tag, value in returned.items()}
        else:
            tagged = {self._name or self.word: returned}
        values = {tag: self._check(value, tag) for tag, value in tagged.items()}
        if values:
            self._write(info, values)

    def _tag(self, tag: Any) -> str:
        if not isinstance(tag, str) or not tag:
            raise TypeError(
                f"{type(self).__name__}: fn returned a mapping with the key {tag!r}; the tags of a log are non-empty "
                "strings."
            )
        return tag if self._name is None else f"{self._name}/{tag}"


def check_name(callback: str, name: object) -> None:
    """Refuses what is no name in a log; None is left open."""
    if name is not None and (not isinstance(name, str) or not name):
        raise TypeError(f"{callback}(name={name!r}): expected a non-empty string.")
