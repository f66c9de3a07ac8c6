"""The calls in which the training steps of a trainer are dispatched. Owns what a call is; not when one is due."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeGuard

import jax

from trainkit._calls.choice import SINGLE, Choice, Remembered, cache_folder
from trainkit._calls.flops import flops_of
from trainkit._calls.programs import Make, Programs, form_of, make_of, spec_of_call
from trainkit._calls.tuner import Tuner, is_candidate
from trainkit._core.typing import PyTree
from trainkit._feed.feed import Fed
from trainkit._feed.resident import NOTHING
from trainkit.parallel._strategy import Strategy


class CallSettings(NamedTuple):
    """What the user asked for.

    Attributes:
        steps_per_call: None to find it by measurement.
        cpu_settings: whether XLA's scheduler on a CPU may be chosen with it.
    """

    steps_per_call: int | None = 1
    cpu_settings: bool = True


ONE_BY_ONE = CallSettings()
"""One step a call, and no setting of the CPU chosen."""


class Calls:
    """Runs training steps, one or several a call.

    Attributes:
        compiled_in: seconds that compiling the single step took, where that was done ahead.

    Args:
        step: `step(raw, packed, held, batch, mask) -> (raw, packed)`, pure.
        single: `step` compiled.
        strategy: compiles calls of several.
        settings: of the user.
    """

    def __init__(
        self, step: Callable[..., Any], single: Callable[..., Any], strategy: Strategy, settings: CallSettings
    ) -> None:
        self._step, self._single, self._strategy, self._settings = step, single, strategy, settings
        self.compiled_in = 0.0
        self._held: PyTree = NOTHING
        self._given: Choice | None = None
        self._tuners: dict[tuple[Any, ...], Tuner] = {}
        self._tuner: Tuner | None = None
        self._make: Make | None = None
        self._example: Any = None
        self._flops: float | None = None

    @property
    def choice(self) -> Choice | None:
        """How steps are put into calls; None while it is being measured, or before the first."""
        return SINGLE if self._alone else self._tuner and self._tuner.choice

    def describe(self) -> str:
        """Returns the choice in a few words, with the bytes of what one call takes together and what is held."""
        choice, said = self.choice, "single"
        if choice is None:
            said = "single (being measured)" if self._tuner else "single"
        elif self._tuner is not None:
            said = str(choice)
            if choice.size > 1:
                said += f", {choice.size * self._tuner.programs.bytes:,} bytes of batches a call"
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(self._held[-1:]))
        return f"{said}; {held:,} bytes of data on the device" if held else said

    def begin(self, given: Choice | None, steps: float | None, held: PyTree = NOTHING) -> None:
        """Begins a fit.

        Args:
            given: the choice of the run that is resumed, None to find one.
            steps: that the fit is going to run, None where it is not known.
            held: what steps are given at each call: beside state and batch, and data on the device from which they
                pick the rows that they are given the numbers of.
        """
        self._held = held
        # A number of steps that the user gave leaves nothing open.
        self._given = given if self._settings.steps_per_call is None else None
        self._remaining, self._tuner = steps or 0, None

    def hold(self, held: PyTree) -> bool:
        """Has steps be given something else from now on; says whether they are another program, to be opened anew.

        Such a program is called as the one before.
        """
        if jax.tree.structure(held) == jax.tree.structure(self._held):
            return False
        if self._settings.steps_per_call is None and self.choice is not None:
            self._given = self.choice
        self._held, self._tuner = held, None
        return True

    def open(self, raw: Any, packed: Any, first: Fed) -> None:
        """Begins a pass over the data, whose first batch is `first`: most batches are expected to be of its make."""
        if self._example is None and make_of(first) is not None:
            self._example = spec_of_call(raw, packed, self._held, first)
        if self._alone:
            return
        self._make = make_of(first)
        if self._make is None:
            self._tuner = None
            return
        # A step may settle the shapes of its state: what comes after that is other programs.
        kind = self._make, jax.tree.structure(self._held), form_of(raw)
        known = self._tuners.get(kind)
        if known is None:
            known = self._tuners[kind] = self._new_tuner(raw, packed, first)
        if known is not self._tuner:
            self._tuner = known
            self._settle(known)
            known.expect(self._remaining)
        known.resume()

    def flops(self) -> float | None:
        """Returns the floating point operations of one step on all devices, None where they can't be known."""
        if self._flops is None and self._example is not None and isinstance(self._single, jax.stages.Wrapped):
            replicas = 1 if self._strategy.replica_axis is None else self._strategy.shards
            self._flops = flops_of(self._single, self._example, replicas) or 0.0
        return self._flops or None

    def room(self, left: float) -> int:
        """Returns how many steps the next call takes when `left` steps may run before the host has anything to do."""
        tuner = self._tuner
        return 1 if tuner is None else tuner.current.room(left, any_size=tuner.any_size)

    def takes(self, fed: Fed) -> bool:
        """Says whether a batch can share a call with others, being of the make of this pass."""
        return self._make is not None and self._make.fits(fed)

    def __call__(self, raw: Any, packed: Any, feds: Sequence[Fed]) -> tuple[Any, Any]:
        """Runs one step for each batch; returns the next state and the next carried metrics."""
        tuner = self._tuner
        run = None if tuner is None else tuner.runs.get(tuner.current)
        if run is not None and self._fits(tuner, feds):
            raw, packed = run(raw, packed, self._held, feds)
        else:
            for fed in feds:
                raw, packed = self._single(raw, packed, self._held, fed.batch, fed.mask)
        if tuner is not None and tuner.choice is None:
            tuner.ran(len(feds), packed)
        return raw, packed

    def probed(self, run: Callable[..., Any], raw: Any, packed: Any, fed: Fed) -> tuple[Any, Any, Any]:
        """Runs one step by a program that returns something beside what all do; it takes no part in any measurement."""
        self.pause()
        return run(raw, packed, self._held, fed.batch, fed.mask)

    def pause(self) -> None:
        """Tells that the host does something else than dispatching steps."""
        if self._tuner is not None:
            self._tuner.pause()

    def resume(self) -> None:
        """Tells that the next step comes at once."""
        if self._tuner is not None:
            self._tuner.resume()

    @property
    def _alone(self) -> bool:
        return self._settings.steps_per_call == 1

    def _new_tuner(self, raw: Any, packed: Any, first: Fed) -> Tuner:
        programs = Programs(self._step, self._single, self._strategy, first, raw, packed, self._held)
        folder = cache_folder() if self._settings.steps_per_call is None and programs.can_lower else None
        machine = (programs.platform, programs.device_kind, repr(self._settings))
        remembered = Remembered(folder, programs.text, *machine) if folder else None
        return Tuner(
            programs,
            cpu_settings=self._settings.cpu_settings,
            compiled_in=self.compiled_in,
            remembered=remembered,
        )

    def _settle(self, tuner: Tuner) -> None:
        """Ends the measuring where the choice is given."""
        programs, steps, given = tuner.programs, self._settings.steps_per_call, self._given
        if programs.can_repeat and self._is_candidate(given, programs):
            if given != tuner.choice:
                tuner.settle(given)
        elif tuner.choice is not None:
            return
        elif not programs.can_repeat or (steps is None and self._strategy.processes > 1):
            tuner.settle(SINGLE)
        elif steps is not None:
            tuner.settle(Choice("unrolled" if self._no_loop(programs) else "scanned", steps))
        elif tuner.remembered is not None:
            remembered = tuner.remembered.load()
            if self._is_candidate(remembered, programs):
                tuner.settle(remembered)

    def _is_candidate(self, choice: Choice | None, programs: Programs) -> TypeGuard[Choice]:
        return choice is not None and is_candidate(
            choice,
            programs.bytes,
            programs.platform,
            convolves=programs.convolves,
            cpu_settings=self._settings.cpu_settings,
        )

    def _no_loop(self, programs: Programs) -> bool:
        return programs.platform == "cpu" and programs.convolves

    def _fits(self, tuner: Any, feds: Sequence[Fed]) -> bool:
        choice = tuner.current
        if len(feds) == choice.size == 1:
            return self.takes(feds[0])
        return len(feds) == choice.size or (len(feds) > 1 and tuner.any_size)
