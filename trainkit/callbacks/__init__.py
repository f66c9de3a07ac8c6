"""Callbacks: host code that runs at fixed moments of a fit, and what it is told.

Each file owns one callback; `_callback.py` owns the moments and what a hook may return. The order in which callbacks
are called is the loop's, and what of them runs inside the compiled step is in `hooks/`.
"""

from trainkit.callbacks._activation_stats import ActivationStats
from trainkit.callbacks._callback import Callback, Phase, Rollback, Save, Stop, Update
from trainkit.callbacks._checkpoint import Checkpoint
from trainkit.callbacks._confusion_matrix import ConfusionMatrix
from trainkit.callbacks._early_stopping import EarlyStopping
from trainkit.callbacks._ema import EMA
from trainkit.callbacks._embedding import Embedding
from trainkit.callbacks._eval_view import EvalView
from trainkit.callbacks._figure import Figure
from trainkit.callbacks._finetune import Finetune
from trainkit.callbacks._gradient_noise_scale import GradientNoiseScale
from trainkit.callbacks._hparams import HParams
from trainkit.callbacks._images import Images
from trainkit.callbacks._info import Info, Plan, Work
from trainkit.callbacks._lambda import Lambda
from trainkit.callbacks._learning_rate import LearningRate
from trainkit.callbacks._log_metrics import LogMetrics
from trainkit.callbacks._memory import Memory
from trainkit.callbacks._model_summary import ModelSummary
from trainkit.callbacks._nan_guard import NanGuard
from trainkit.callbacks._optuna_prune import OptunaPrune
from trainkit.callbacks._probe import Probe
from trainkit.callbacks._profile import Profile
from trainkit.callbacks._progress import Progress
from trainkit.callbacks._reduce_on_plateau import ReduceOnPlateau
from trainkit.callbacks._set_hyperparam import SetHyperparam
from trainkit.callbacks._spike_guard import SpikeGuard
from trainkit.callbacks._stop_after import StopAfter
from trainkit.callbacks._stop_when import StopWhen
from trainkit.callbacks._swa import SWA
from trainkit.callbacks._text import Text
from trainkit.callbacks._throughput import Throughput
from trainkit.callbacks._watch import Watch

__all__ = [
    "ActivationStats",
    "Callback",
    "Checkpoint",
    "ConfusionMatrix",
    "EMA",
    "EarlyStopping",
    "Embedding",
    "EvalView",
    "Figure",
    "Finetune",
    "GradientNoiseScale",
    "HParams",
    "Images",
    "Info",
    "Lambda",
    "LearningRate",
    "LogMetrics",
    "Memory",
    "ModelSummary",
    "NanGuard",
    "OptunaPrune",
    "Phase",
    "Plan",
    "Probe",
    "Profile",
    "Progress",
    "ReduceOnPlateau",
    "Rollback",
    "SWA",
    "Save",
    "SetHyperparam",
    "SpikeGuard",
    "Stop",
    "StopAfter",
    "StopWhen",
    "Text",
    "Throughput",
    "Update",
    "Watch",
    "Work",
]
