"""Metrics beyond those of `clu.metrics`, and what accumulates a collection of them in a compiled step.

Owns how values are counted, merged and computed, exactly under masks. When they are read is the loop's affair, and
where they are written the writers'.
"""

from trainkit.metrics._accumulator import Accumulator, LossMetrics
from trainkit.metrics._collecting import Collecting, collecting
from trainkit.metrics._confusion import F1, ConfusionMatrix, Precision, Recall
from trainkit.metrics._direction import register_direction
from trainkit.metrics._mean import Accuracy, Mean, means
from trainkit.metrics._perplexity import Perplexity
from trainkit.metrics._regression import MAE, MSE, R2, Spearman
from trainkit.metrics._roc_auc import ROCAUC
from trainkit.metrics._std import Std
from trainkit.metrics._top_k import TopKAccuracy

__all__ = [
    "Accumulator",
    "Accuracy",
    "Collecting",
    "ConfusionMatrix",
    "F1",
    "LossMetrics",
    "MAE",
    "MSE",
    "Mean",
    "Perplexity",
    "Precision",
    "R2",
    "ROCAUC",
    "Recall",
    "Spearman",
    "Std",
    "TopKAccuracy",
    "collecting",
    "means",
    "register_direction",
]
