"""trainkit: training for JAX and Flax.

You write a model and a loss; it owns the state, the step, the loop and the logs.
"""

import importlib
from typing import TYPE_CHECKING, Any

from trainkit import callbacks, data, hooks, metrics, optim, parallel, writers
from trainkit._core.cadence import At, Every, Never
from trainkit._core.context import StepContext
from trainkit._core.errors import NonFiniteError
from trainkit._core.history import History
from trainkit._core.state import TrainState
from trainkit._core.weighted import Weighted
from trainkit._loop.result import FitResult
from trainkit._trainer.trainer import Trainer
from trainkit._version import __version__
from trainkit.callbacks._callback import Rollback, Save, Stop, Update

if TYPE_CHECKING:
    from trainkit import checkpoint, export, testing
    from trainkit.export._serialize import load, save

__all__ = [
    "At",
    "Every",
    "FitResult",
    "History",
    "Never",
    "Rollback",
    "Save",
    "NonFiniteError",
    "StepContext",
    "Stop",
    "TrainState",
    "Trainer",
    "Update",
    "Weighted",
    "__version__",
    "callbacks",
    "checkpoint",
    "data",
    "export",
    "hooks",
    "load",
    "metrics",
    "optim",
    "parallel",
    "save",
    "testing",
    "writers",
]

# What few programs need is imported at its first use.
_LAZY_MODULES = {
    "checkpoint": "trainkit.checkpoint",
    "export": "trainkit.export",
    "testing": "trainkit.testing",
}
_LAZY_FUNCTIONS = {"load": "trainkit.export._serialize", "save": "trainkit.export._serialize"}


def __getattr__(name: str) -> Any:
    if name in _LAZY_MODULES:
        return importlib.import_module(_LAZY_MODULES[name])
    if name in _LAZY_FUNCTIONS:
        return getattr(importlib.import_module(_LAZY_FUNCTIONS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
