"""Which way a metric improves.

Owns the registry by metric class; who monitors a metric decides what to do with it.
"""

from typing import Literal

from clu import metrics

from trainkit.metrics._confusion import F1, Precision, Recall
from trainkit.metrics._inputs import output_name
from trainkit.metrics._mean import Accuracy
from trainkit.metrics._perplexity import Perplexity
from trainkit.metrics._regression import MAE, MSE, R2, Spearman
from trainkit.metrics._roc_auc import ROCAUC
from trainkit.metrics._top_k import TopKAccuracy

Direction = Literal["min", "max"]

_DIRECTIONS: dict[type[metrics.Metric], Direction] = {
    metrics.Accuracy: "max",
    Accuracy: "max",
    TopKAccuracy: "max",
    ROCAUC: "max",
    Precision: "max",
    Recall: "max",
    F1: "max",
    Perplexity: "min",
    MAE: "min",
    MSE: "min",
    R2: "max",
    Spearman: "max",
}


def register_direction(metric: type[metrics.Metric], direction: Direction) -> None:
    """Says which way a metric class and its subclasses improve, so that monitors need no `mode`.

    Args:
        metric: the metric class.
        direction: "min" if lower is better, "max" if higher is.

    Raises:
        TypeError: if `metric` is not a metric class.
        ValueError: if the direction is another word, or the class is registered the other way round.
    """
    if not (isinstance(metric, type) and issubclass(metric, metrics.Metric)):
        raise TypeError(f"register_direction takes a subclass of clu.metrics.Metric, got {metric!r}.")
    if direction not in ("min", "max"):
        raise ValueError(f'A direction is "min" or "max", got {direction!r}.')
    if _DIRECTIONS.setdefault(metric, direction) != direction:
        raise ValueError(f"{metric.__name__} is registered as {_DIRECTIONS[metric]!r} already.")


def direction_of(metric: type[metrics.Metric], name: str) -> Direction | None:
    """Returns which way a metric improves, or None if nothing says so.

    A mean improves downwards if it is of the output `loss` or goes by that name.

    Args:
        metric: the metric class.
        name: its name in the collection.

    Returns:
        "min", "max" or None.
    """
    for base in metric.__mro__:
        if base in _DIRECTIONS:
            return _DIRECTIONS[base]
    is_mean = issubclass(metric, (metrics.Average, metrics.LastValue))
    return (
        "min" if is_mean and "loss" in (name, output_name(metric), getattr(metric, "output", None)) else None
    )
