"""Cadences: frozen values that say when something is due. The modulo operator of the project stands here.

Owns no clock: a cadence in seconds is given the time by the loop.
"""

import abc
import dataclasses
import math
from typing import ClassVar

NEVER = math.inf
"""The step that never comes."""


class Cadence(abc.ABC):
    """When something is due: `Every`, `At` or `Never`."""

    epochs: int | None = None
    seconds: float | None = None

    @abc.abstractmethod
    def next_step(self, step: int) -> float:
        """Returns the first step after `step` at which this is due by its count of steps (`inf`: none)."""

    def due_epoch(self, epoch: int) -> bool:
        """Says whether this is due at the end of the pass that completes epoch number `epoch` (from 1)."""
        return False


@dataclasses.dataclass(frozen=True)
class Every(Cadence):
    """Due every so many steps, epochs or seconds; exactly one of the three is given.

    Steps and epochs count from the start of training, not of a fit: `Every(steps=50)` is due at steps
    50, 100, ... An interval in seconds counts from the last time it was due.

    Args:
        steps: int >= 1, updates.
        epochs: int >= 1, completed passes over the training source.
        seconds: float > 0, wall-clock time.

    Raises:
        ValueError: none or several are given, or one is out of range.

    Example:
        >>> Every(steps=50).next_step(50)
        100
    """

    steps: int | None = None
    epochs: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(
                f"Every takes exactly one of steps=, epochs= and seconds=; got {given or 'none'}. "
                "Give one, e.g. Every(steps=50)."
            )
        ((name, value),) = given.items()
        whole = name == "seconds" or (isinstance(value, int) and not isinstance(value, bool))
        if not whole or value <= 0:
            raise ValueError(
                f"Every({name}={value!r}): {name} must be a positive {'int' if name != 'seconds' else 'number'}."
            )

    def next_step(self, step: int) -> float:
        if self.steps is None:
            return NEVER
        return step - step % self.steps + self.steps

    def due_epoch(self, epoch: int) -> bool:
        return self.epochs is not None and epoch % self.epochs == 0


@dataclasses.dataclass(frozen=True)
class At(Cadence):
    """Due at the given steps and no others.

    Args:
        steps: ints >= 1 in any order.

    Raises:
        ValueError: a step is not a positive int, or there is none.

    Example:
        >>> At(steps=(10, 100)).next_step(10)
        100
    """

    steps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        steps = (self.steps,) if isinstance(self.steps, int) else tuple(self.steps)
        if not steps or any(not isinstance(step, int) or step < 1 for step in steps):
            raise ValueError(
                f"At(steps={self.steps!r}): give one or more positive ints, e.g. At(steps=(10, 100))."
            )
        object.__setattr__(self, "steps", tuple(sorted(set(steps))))

    def next_step(self, step: int) -> float:
        return next((at for at in self.steps if at > step), NEVER)


@dataclasses.dataclass(frozen=True)
class Never(Cadence):
    """Never due."""

    steps: ClassVar[None] = None

    def next_step(self, step: int) -> float:
        return NEVER


def as_cadence(value: object, argument: str, *, comes: bool = False) -> Cadence:
    """Returns `value` if it is a cadence.

    Args:
        value: to be looked at.
        argument: names it in messages.
        comes: whether it must come at all: `Never` is refused for what does nothing else.

    Raises:
        TypeError: it is something else; the message names `argument`.
        ValueError: it never comes.
    """
    if isinstance(value, Cadence):
        if comes and isinstance(value, Never):
            raise ValueError(
                f"{argument}={value!r}: it would never come, and nothing be done. Write e.g. tk.Every(steps=50), or "
                "leave the callback out."
            )
        return value
    raise TypeError(
        f"{argument}={value!r}: expected tk.Every(steps=|epochs=|seconds=), tk.At(steps=...) or tk.Never(). "
        "For every 50 updates write tk.Every(steps=50)."
    )
