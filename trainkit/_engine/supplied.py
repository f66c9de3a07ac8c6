"""Programs that are given the constants of their trainer. Owns when these are looked up: at each call."""

from collections.abc import Callable
from typing import Any

import jax

from trainkit._step.given import Given


class Supplied:
    """A compiled program whose first argument is what the trainer gives its steps beside state and batch.

    Attributes:
        program: the program itself.

    Args:
        program: `program(given, *args)`, compiled.
        given: returns the constants of the moment, on the devices.
    """

    def __init__(self, program: Callable[..., Any], given: Callable[[], Given | None]) -> None:
        self.program, self._given = program, given

    def __call__(self, *args: Any) -> Any:
        """Runs the program."""
        return self.program(self._given(), *args)

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """Returns the program for arguments of these shapes, traced and not yet compiled."""
        program: Any = self.program
        return program.lower(self._given(), *args)
