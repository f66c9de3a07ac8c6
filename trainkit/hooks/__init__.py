"""Step hooks and probes: what callbacks have traced into the compiled step; and views, what they show of a state.

A hook is a pure pair, `init` and `update`, with memory in `state.hooks`; a probe is a function of the steps at which
it is due. Each file owns one. The callback that asks for
it is in `callbacks/`, and the step that calls it is `_step/`'s.
"""

from trainkit.hooks._ema import EmaState
from trainkit.hooks._hook import StepHook, StepValues
from trainkit.hooks._nan_guard import NanGuardState
from trainkit.hooks._probe import StepProbe
from trainkit.hooks._spike_guard import SpikeGuardState
from trainkit.hooks._swa import SwaState
from trainkit.hooks._view import Refresh, View

__all__ = [
    "EmaState",
    "NanGuardState",
    "Refresh",
    "SpikeGuardState",
    "StepHook",
    "StepProbe",
    "StepValues",
    "SwaState",
    "View",
]
