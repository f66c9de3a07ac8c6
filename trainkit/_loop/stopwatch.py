"""Where the time of a fit goes. Owns the sums; which part runs is said by the loop, where host code runs anyway."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import jax.monitoring

from trainkit._core.phases import phase, phases_are_named

PARTS = ("compile", "data", "step", "eval", "save", "callbacks", "other")
"""The parts of a fit, which add up to the whole of it."""

_NAMED = ("eval", "save", "callbacks")
"""Those that have a name in traces from here; steps and data have it where they are dispatched, one by one."""
_COMPILING = "/jax/core/compile/"


class Stopwatch:
    """Sums up the seconds of each part of a fit.

    It waits for no device: what steps still run when the host turns to something else that waits for them, counts
    for that.

    Attributes:
        clock: returns seconds.
        seconds: of each part, up to the last turn.

    Args:
        clock: as above.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._part = "other"
        self._begun = self._since = clock()
        self._phase: contextlib.ExitStack | None = None
        # Programs that were compiled within the tracing of another, as (begun, seconds): not to be counted twice.
        self._compiled: list[tuple[float, float]] = []

    def turn(self, part: str) -> str:
        """Counts for `part` from now on; returns what was counted for before."""
        now = self.clock()
        self.seconds[self._part] += now - self._since
        before, self._part, self._since = self._part, part, now
        if self._phase is not None or phases_are_named():
            self._name(part)
        return before

    def _name(self, part: str) -> None:
        if self._phase is not None:
            self._phase.close()
            self._phase = None
        if part in _NAMED and phases_are_named():
            self._phase = contextlib.ExitStack()
            self._phase.enter_context(phase(part))

    def move(self, seconds: float, part: str) -> None:
        """Counts seconds of the running part for another."""
        self.seconds[self._part] -= seconds
        self.seconds[part] += seconds

    @contextlib.contextmanager
    def on(self, part: str) -> Iterator[None]:
        """Counts for `part` within."""
        before = self.turn(part)
        try:
            yield
        finally:
            self.turn(before)

    def read(self) -> tuple[float, dict[str, float]]:
        """Returns the seconds since it was started, and those of each part."""
        self.turn(self._part)
        return self._since - self._begun, dict(self.seconds)

    @contextlib.contextmanager
    def noting_compilation(self) -> Iterator[None]:
        """Takes what JAX compiles in this thread out of the part that runs."""
        thread = threading.get_ident()

        def note(event: str, duration_secs: float, **_: str | int) -> None:
            if event.startswith(_COMPILING) and threading.get_ident() == thread:
                self._note(duration_secs)

        jax.monitoring.register_event_duration_secs_listener(note)
        try:
            yield
        finally:
            with contextlib.suppress(Exception):  # somebody may have cleared all listeners
                jax.monitoring.unregister_event_duration_listener(note)

    def _note(self, seconds: float) -> None:
        if self._part == "compile":
            return
        begun, within = time.monotonic() - seconds, 0.0
        while self._compiled and self._compiled[-1][0] >= begun:
            within += self._compiled.pop()[1]
        self._compiled.append((begun, seconds))
        self.move(seconds - within, "compile")
