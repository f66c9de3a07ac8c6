"""Step hooks and probes: what callbacks have traced into the compiled step.

A hook is a pure pair, `init` and `update`, with memory in `state.hooks`; a probe is a function of the steps at which
it is due. Each file owns one. The callback that asks for
it is in `callbacks/`, and the step that calls it is `_step/`'s.
"""

from trainkit.hooks._ema import EmaState
from trainkit.hooks._hook import StepHook, StepValues
from trainkit.hooks._nan_guard import NanGuardState
from trainkit.hooks._probe import StepProbe
from trainkit.hooks._spike_guard import SpikeGuardState

__all__ = ["EmaState", "NanGuardState", "SpikeGuardState", "StepHook", "StepProbe", "StepValues"]
