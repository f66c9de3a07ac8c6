"""The area under the ROC curve of a binary classifier.

Owns the rank statistic; rows are kept by `Collecting`.
"""

from collections.abc import Iterable

import flax.struct
import numpy as np

from trainkit.metrics._collecting import Collecting, Rows


def average_ranks(scores: np.ndarray) -> np.ndarray:
    """Returns the ranks from 1 of the elements of a vector, equal ones at the mean of theirs."""
    _, group, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group.reshape(-1)]


@flax.struct.dataclass
class ROCAUC(Collecting):
    """The area under the ROC curve of a binary classifier, exact, with ties counted as one half.

    Reads `labels` in {0, 1} and `scores` `[batch]`, a higher score meaning class 1; without an output
    `scores`, `logits` `[batch]` or `[batch, 1]`, or `[batch, 2]`, of which the difference of the columns is
    the score (one column alone doesn't rank softmax outputs). Computed as the Mann-Whitney statistic (Hanley
    and McNeil 1982). NaN if there is only one class among the labels or a score is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainkit.metrics import ROCAUC
        >>> batch = {"scores": jnp.array([0.1, 0.4, 0.35, 0.8]), "labels": jnp.array([0, 0, 1, 1])}
        >>> ROCAUC.from_model_output(**batch).compute()
        0.75
    """

    @classmethod
    def wanted(cls, available: Iterable[str]) -> tuple[str, ...]:
        """Returns the labels, and the scores where there are any, or else the logits."""
        return ("labels", "scores" if "scores" in available else "logits")

    @classmethod
    def from_rows(cls, rows: Rows) -> float:
        """Returns the area.

        Args:
            rows: `labels` `[rows]` and `scores` `[rows]` or `logits` `[rows]`, `[rows, 1]` or `[rows, 2]`.

        Returns:
            The area, between 0 and 1, or NaN.

        Raises:
            ValueError: if the labels are not 0 and 1, or the scores are not of a binary classifier.
        """
        labels = rows["labels"].reshape(-1)
        if not np.isin(labels, (0, 1)).all():
            raise ValueError(f"ROCAUC is for the labels 0 and 1, got {np.unique(labels)[:8].tolist()}.")
        scores = cls._scores(rows, len(labels))
        positives = int((labels == 1).sum())
        negatives = len(labels) - positives
        if not positives or not negatives or np.isnan(scores).any():
            return float("nan")
        ranks = average_ranks(scores)[labels == 1].sum()
        return float((ranks - positives * (positives + 1) / 2) / (positives * negatives))

    @staticmethod
    def _scores(rows: Rows, size: int) -> np.ndarray:
        name = "scores" if "scores" in rows else "logits"
        scores = rows[name]
        if scores.shape == (size, 2):
            # In float64, so that the difference of two float32 numbers makes no new ties.
            scores = scores[:, 1].astype(np.float64) - scores[:, 0].astype(np.float64)
        if scores.size != size:
            raise ValueError(
                f"ROCAUC is for binary classifiers: {name!r} must be [rows], [rows, 1] or [rows, 2], got "
                f"{list(scores.shape)} for {size} labels. Return the score of class 1 as the output 'scores'."
            )
        return scores.reshape(-1)
