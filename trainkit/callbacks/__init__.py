"""Callbacks: host code that runs at fixed moments of a fit, and what it is told.

Each file owns one callback; `_callback.py` owns the moments and what a hook may return. The order in which callbacks
are called is the loop's, and what of them runs inside the compiled step is in `hooks/`.
"""

from trainkit.callbacks._activation_stats import ActivationStats
from trainkit.callbacks._callback import Callback, Phase, Rollback, Save, Stop, Update
from trainkit.callbacks._checkpoint import Checkpoint
from trainkit.callbacks._early_stopping import EarlyStopping
from trainkit.callbacks._ema import EMA
from trainkit.callbacks._eval_view import EvalView
from trainkit.callbacks._gradient_noise_scale import GradientNoiseScale
from trainkit.callbacks._info import Info, Plan
from trainkit.callbacks._lambda import Lambda
from trainkit.callbacks._learning_rate import LearningRate
from trainkit.callbacks._log_metrics import LogMetrics
from trainkit.callbacks._nan_guard import NanGuard
from trainkit.callbacks._probe import Probe
from trainkit.callbacks._progress import Progress
from trainkit.callbacks._reduce_on_plateau import ReduceOnPlateau
from trainkit.callbacks._spike_guard import SpikeGuard
from trainkit.callbacks._swa import SWA
from trainkit.callbacks._watch import Watch

__all__ = [
    "ActivationStats",
    "Callback",
    "Checkpoint",
    "EMA",
    "EarlyStopping",
    "GradientNoiseScale",
    "EvalView",
    "Info",
    "Lambda",
    "LearningRate",
    "LogMetrics",
    "NanGuard",
    "Phase",
    "Plan",
    "Probe",
    "Progress",
    "ReduceOnPlateau",
    "Rollback",
    "SWA",
    "Save",
    "SpikeGuard",
    "Stop",
    "Update",
    "Watch",
]
