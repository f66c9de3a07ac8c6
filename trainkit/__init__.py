"""trainkit: training for JAX and Flax.

You write a model and a loss; it owns the state, the step, the loop and the logs.
"""

from trainkit import callbacks, data, export, hooks, metrics, parallel, testing, writers
from trainkit._context import StepContext
from trainkit._history import History
from trainkit._result import FitResult
from trainkit._serialize import load, save
from trainkit._state import TrainState
from trainkit._trainer import Trainer
from trainkit._version import __version__
from trainkit._when import At, Every, Never
from trainkit.callbacks._callback import Stop, Update

__all__ = [
    "At",
    "Every",
    "FitResult",
    "History",
    "Never",
    "StepContext",
    "Stop",
    "TrainState",
    "Trainer",
    "Update",
    "__version__",
    "callbacks",
    "data",
    "export",
    "hooks",
    "load",
    "metrics",
    "parallel",
    "save",
    "testing",
    "writers",
]
