"""Step hooks: what callbacks have traced into the compiled step; and views, what they show of a state.

A hook is a pure pair, `init` and `update`, with memory in `state.hooks`; each file owns one. The callback that asks for
it is in `callbacks/`, and the step that calls it is `_step/`'s.
"""

from trainkit.hooks._ema import EmaState
from trainkit.hooks._hook import StepHook, StepValues
from trainkit.hooks._nan_guard import NanGuardState
from trainkit.hooks._swa import SwaState
from trainkit.hooks._view import Refresh, View

__all__ = ["EmaState", "NanGuardState", "Refresh", "StepHook", "StepValues", "SwaState", "View"]
