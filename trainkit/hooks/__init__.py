"""Step hooks: what callbacks trace into the compiled step."""

from trainkit.hooks._ema import EmaState
from trainkit.hooks._hook import StepHook, StepValues
from trainkit.hooks._nan_guard import NanGuardState

__all__ = ["EmaState", "NanGuardState", "StepHook", "StepValues"]
