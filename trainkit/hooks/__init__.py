"""Step hooks: what callbacks trace into the compiled step."""

from trainkit.hooks._ema import EmaState
from trainkit.hooks._hook import StepHook, StepValues

__all__ = ["EmaState", "StepHook", "StepValues"]
