"""Calls the hooks of callbacks in their order, and makes sure that every callback begun is closed.

Owns the order among callbacks; not when a hook is due, which is the loop's.
"""

import logging
import reprlib
from collections.abc import Callable, Sequence
from typing import Any

from trainkit._core.cadence import At
from trainkit.callbacks._callback import Callback, Phase, Rollback, Save, Stop, Update
from trainkit.callbacks._info import Info, Plan

InfoFor = Callable[[Callback, str], Info]
"""Makes the information for one call: `info_for(callback, hook)`."""

Act = Callable[[Callback, Stop | Update | Save | Rollback], None]
"""Carries out what a hook returned."""


_LOG = logging.getLogger("trainkit")


class Dispatcher:
    """The callbacks of one fit, in order of phase and then as given."""

    def __init__(self, callbacks: Sequence[Callback], info_for: InfoFor, act: Act) -> None:
        self._callbacks = sorted(callbacks, key=lambda callback: callback.phase)
        self._info_for, self._act = info_for, act
        self._begun: list[Callback] = []
        self._implementing: dict[str, list[Callback]] = {}

    def implementing(self, hook: str) -> list[Callback]:
        """Returns the callbacks that override `hook`, in order."""
        if hook not in self._implementing:
            self._implementing[hook] = [one for one in self._callbacks if one.implements(hook)]
        return self._implementing[hook]

    def start(self) -> None:
        """Calls `on_fit_start`; from here on each callback reached is closed at the end."""
        for callback in self._callbacks:
            self._begun.append(callback)
            if callback.implements("on_fit_start"):
                self._call(callback, "on_fit_start")
            if callback.phase is Phase.WRITE and callback.implements("on_step"):
                _tell_if_never_due(callback, self._info_for(callback, "on_fit_start").plan)

    def call(self, hook: str) -> None:
        """Calls `hook` of every callback that overrides it."""
        self.call_each(hook, self.implementing(hook))

    def call_each(self, hook: str, callbacks: Sequence[Callback]) -> None:
        """Calls `hook` of `callbacks`, which are in order."""
        for callback in callbacks:
            self._call(callback, hook)

    def exception(self, exc: BaseException) -> None:
        """Tells every callback begun of `exc`; what they raise is added to it as a note."""
        for callback in self._begun:
            if callback.implements("on_exception"):
                info = self._info_for(callback, "on_exception")
                try:
                    callback.on_exception(info, exc)
                except BaseException as error:  # a second Ctrl-C too: the others are still to be told
                    exc.add_note(f"{_name(callback)}.on_exception raised as well: {error!r}")
                finally:
                    info.expire()

    def close(self) -> list[BaseException]:
        """Closes every callback begun, whatever the others do; returns what they raised."""
        errors: list[BaseException] = []
        for callback in self._begun:
            if callback.implements("close"):
                try:
                    callback.close()
                except BaseException as error:
                    errors.append(error)
        self._begun = []
        return errors

    def _call(self, callback: Callback, hook: str) -> None:
        info = self._info_for(callback, hook)
        try:
            action: Any = getattr(callback, hook)(info)
        finally:
            info.expire()
        if action is None:
            return
        if not isinstance(action, (Stop, Update, Save, Rollback)):
            raise TypeError(
                f"{_name(callback)}.{hook} returned {reprlib.repr(action)}; a hook returns tk.Stop(reason), "
                "tk.Update(fn), tk.Save(), tk.Rollback(reason) or None."
            )
        self._act(callback, action)


def guards(callbacks: Sequence[Callback]) -> list[Callback]:
    """Returns the callbacks of the first phase, which may refuse what was done since they last looked."""
    return [callback for callback in callbacks if callback.phase == Phase.GUARD]


def before_checkpoints(callbacks: Sequence[Callback]) -> list[Callback]:
    """Returns the callbacks of the phases between the guards and an evaluation at the same step."""
    return [callback for callback in callbacks if Phase.GUARD < callback.phase < Phase.CHECKPOINT]


def checkpoints(callbacks: Sequence[Callback]) -> list[Callback]:
    """Returns the callbacks of the last phase, after an evaluation at the same step."""
    return [callback for callback in callbacks if callback.phase >= Phase.CHECKPOINT]


def _name(callback: Callback) -> str:
    return type(callback).__name__


def _tell_if_never_due(callback: Callback, plan: Plan) -> None:
    every = callback.every
    if isinstance(every, At) and plan.steps is not None and every.steps[0] > plan.steps and not plan.dry_run:
        _LOG.warning(
            "%s is due at the steps %s, and this fit ends at step %d: it is never called.",
            type(callback).__name__,
            reprlib.repr(every.steps),
            plan.steps,
        )
