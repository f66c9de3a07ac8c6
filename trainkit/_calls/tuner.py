"""Measures, on the first steps of a fit, how steps are best put into calls. Owns the clock of that; runs no step.

Every step measured is a step of the training, so nothing is computed twice. What must be compiled for it is
compiled in a thread, while the steps go on one by one.
"""

import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from trainkit._calls.choice import SINGLE, Choice, Remembered
from trainkit._calls.programs import STACKED_BYTES, Programs, Run
from trainkit._core.typing import Clock

_LOG = logging.getLogger("trainkit")

# Signals and times wait for the end of a call.
_LONGEST_CALL = 0.5
# The usual cadence of logs, so that a call ends where they are due.
_MOST_STEPS = 50
# Each of them is compiled.
_MOST_UNROLLED = 4
# Up to here a step is mostly its dispatch.
_SMALL_STEP = 3e-3
_WINDOW, _ROUNDS, _RACE = 0.01, 5, 1.0
# What gains less is not worth a program of its own.
_LEAST_GAIN = 0.98


def candidates(
    seconds: float, size_bytes: int, platform: str, *, convolves: bool, cpu_settings: bool
) -> list[Choice]:
    """Returns what is worth measuring beside single steps.

    Args:
        seconds: that a single step takes.
        size_bytes: of one batch.
        platform: of the devices.
        convolves: whether the step has a convolution.
        cpu_settings: whether XLA's scheduler may be chosen.
    """
    most = min(_MOST_STEPS, int(_LONGEST_CALL / seconds), STACKED_BYTES // max(size_bytes, 1))
    if most < 2 or (platform != "cpu" and seconds > _SMALL_STEP):
        return []
    kinds = [Choice("scanned", most)]
    if platform == "cpu" and convolves:
        kinds = [Choice("unrolled", min(most, _MOST_UNROLLED))]
    elif platform == "cpu" and seconds > _SMALL_STEP:
        kinds += [Choice("unrolled", min(most, _MOST_UNROLLED))]
    if platform == "cpu" and cpu_settings and seconds <= _SMALL_STEP:
        kinds += [Choice(kinds[0].kind, kinds[0].size, "memory"), Choice(scheduler="memory")]
    return kinds


def is_candidate(
    choice: Choice, size_bytes: int, platform: str, *, convolves: bool, cpu_settings: bool
) -> bool:
    """Says whether a choice that was read from a file is one that `candidates` gives for some step, or single steps.

    Another might take hours to compile, or more memory than there is.

    Args:
        choice: as it was read.
        size_bytes: of one batch.
        platform: of the devices.
        convolves: whether the step has a convolution.
        cpu_settings: whether XLA's scheduler may be chosen.
    """
    most = min(_MOST_STEPS, STACKED_BYTES // max(size_bytes, 1))
    sizes = {
        "single": 1,
        "scanned": 0 if platform == "cpu" and convolves else most,
        "unrolled": min(most, _MOST_UNROLLED) if platform == "cpu" else 0,
    }
    schedules = choice.scheduler == "default" or (platform == "cpu" and cpu_settings)
    return choice.size <= sizes[choice.kind] and schedules


class Tuner:
    """The choice for batches of one make, and the measurement that leads to it.

    Attributes:
        choice: None while it is open.
        current: how the next call is made.
        programs: compiles.
        runs: what is compiled, by choice.
        any_size: whether a scanned call may be shorter than its size.
        remembered: keeps the choice for the next start, None where nothing does.

    Args:
        programs: compiles.
        cpu_settings: whether XLA's scheduler may be chosen.
        compiled_in: seconds that compiling the single step took, where it was compiled before the first step.
        remembered: keeps the choice for the next start.
        clock: returns seconds.
    """

    def __init__(
        self,
        programs: Programs,
        *,
        cpu_settings: bool,
        compiled_in: float = 0.0,
        remembered: Remembered | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.choice: Choice | None = None
        self.current = SINGLE
        self.programs = programs
        self.runs: dict[Choice, Run] = {}
        self.any_size = programs.any_size
        self.remembered = remembered
        self._cpu_settings, self._clock = cpu_settings, clock
        self._remaining: float = 0
        self._spent, self._compiling = 0.0, compiled_in
        self._begun: float | None = None
        self._elapsed, self._count, self._window = 0.0, 0, 1
        self._packed: Any = None
        self._then: Callable[[float], None] = self._after_first
        self._thread: threading.Thread | None = None
        self._race: list[tuple[int, Choice]] = []
        self._best: dict[Choice, float] = {}
        self._raced = self._single_seconds = 0.0
        self._least = 1

    def settle(self, choice: Choice) -> None:
        """Ends all measuring: from now on calls are made by `choice`, compiled here where it is not yet."""
        if choice != SINGLE and choice not in self.runs:
            self.runs[choice] = self.programs.compile(choice)
        self.choice = self.current = choice
        self._packed = None
        self.runs = {one: run for one, run in self.runs.items() if one == choice}

    def expect(self, steps: float) -> None:
        """Tells how many steps the fit is going to run; 0 where it is not known."""
        self._remaining = steps

    def resume(self) -> None:
        """Starts the clock: the next step comes at once."""
        if self.choice is None:
            if self._begun is not None:
                self._elapsed, self._count = 0.0, 0  # broken off by an exception
            self._begun = self._clock()

    def pause(self) -> None:
        """Stops the clock, since the host does something else."""
        if self.choice is None and self._begun is not None:
            jax.block_until_ready(self._packed)
            self._elapsed += self._clock() - self._begun
            self._begun = None

    def ran(self, steps: int, packed: Any) -> None:
        """Notes that a call of so many steps was dispatched, which gave `packed`."""
        self._packed = packed
        self._count += steps
        self._remaining -= steps
        if self._thread is not None:
            if not self._thread.is_alive():
                self._thread = None
                self._start_race()
                self._restart()
        elif self._count >= self._window:
            self.pause()
            seconds, count = self._elapsed, self._count
            self._spent += seconds
            self._then(seconds / count)
            self._restart()

    def _restart(self) -> None:
        self._elapsed, self._count, self._begun = 0.0, 0, self._clock()

    def _after_first(self, seconds: float) -> None:
        self._compiling, self._spent = max(seconds, self._compiling), 0.0
        self._window, self._then = 2, self._after_look

    def _after_look(self, seconds: float) -> None:
        self._window = min(2 * self._window, 4096)
        # A busy machine makes steps look larger than they are, never smaller.
        self._single_seconds = min(seconds, self._single_seconds or seconds)
        # Before a fit has cost as much as compiling does, compiling more can't pay.
        if self._elapsed < _WINDOW or self._spent + max(self._remaining, 0) * seconds < self._compiling:
            return
        found = candidates(
            self._single_seconds,
            self.programs.bytes,
            self.programs.platform,
            convolves=self.programs.convolves,
            cpu_settings=self._cpu_settings,
        )
        self._best = {SINGLE: self._single_seconds}
        lowered = {}
        for choice in found:
            try:
                lowered[choice] = self.programs.lower(choice)
            except Exception as error:  # a step that runs alone must not fail since it can't be put in a loop
                _LOG.info("calls %r are left out: %s", str(choice), error)
        if not lowered:
            self._decide()
            return
        self._thread = threading.Thread(target=self._compile, args=(lowered,), name="trainkit-compile")
        self._thread.start()

    def _compile(self, lowered: dict[Choice, jax.stages.Lowered]) -> None:
        for choice, program in lowered.items():
            try:
                self.runs[choice] = self.programs.compile(choice, program)
            except Exception as error:  # for want of memory, say; the other choices remain
                _LOG.info("calls %r are left out: %s", str(choice), error)

    def _start_race(self) -> None:
        choices = [SINGLE, *self.runs]
        # The first round is one call of each, which is slower than those that follow. Of large steps it is left out.
        first = 0 if self._single_seconds < _WINDOW else 1
        self._race = [(number, choice) for number in range(first, _ROUNDS + 1) for choice in choices]
        self._least = max(2, math.ceil(_WINDOW / self._single_seconds))
        self._best, self._raced = {}, 0.0
        self._then = self._after_window
        self._aim()

    def _aim(self) -> None:
        number, self.current = self._race[0]
        self._window = self.current.size if number == 0 else max(self.current.size, self._least)

    def _after_window(self, seconds: float) -> None:
        number, choice = self._race.pop(0)
        if number:
            self._best[choice] = min(seconds, self._best.get(choice, math.inf))
            self._raced += self._elapsed
        ends_round = not self._race or self._race[0][0] != number
        if ends_round and number:
            # What is far behind after a round does not win any more, and must not cost more.
            limit = 1.5 * min(self._best.values())
            self._race = [one for one in self._race if self._best[one[1]] <= limit]
        if not self._race or (ends_round and number >= 2 and self._raced >= _RACE):
            self._decide()
        else:
            self._aim()

    def _decide(self) -> None:
        best = min(self._best, key=lambda choice: self._best[choice])
        if self._best[best] > _LEAST_GAIN * self._best[SINGLE]:
            best = SINGLE
        measured = {str(choice): round(seconds * 1e6, 1) for choice, seconds in self._best.items()}
        self.settle(best)
        _LOG.info("training steps run as %r from now on; microseconds a step: %s", str(best), measured)
        if self.remembered is not None:
            self.remembered.store(best, measured)
