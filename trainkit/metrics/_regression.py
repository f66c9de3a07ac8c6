"""Errors and scores of predicted numbers: `MAE`, `MSE`, `R2` and `Spearman`.

Owns which outputs are compared, and that columns count alike. Ranks are `_roc_auc`'s, sums of weights `_mean`'s.
"""

import abc
from collections.abc import Iterable
from typing import Any, ClassVar, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics

from trainkit.metrics._collecting import Collecting, Rows
from trainkit.metrics._inputs import broadcast_mask
from trainkit.metrics._mean import nothing, weighted_sums
from trainkit.metrics._roc_auc import average_ranks
from trainkit.metrics._variant import variant

_ALLOWED = "Allowed are two arrays of one shape [batch, ...], and [batch] beside [batch, 1]."


class _Compared:
    """Names the outputs that are compared. Before CLU's class in the bases."""

    predictions: ClassVar[str] = "predictions"
    targets: ClassVar[str | None] = None
    weights: ClassVar[str | None] = None

    @classmethod
    def from_outputs(cls, predictions: str = "predictions", targets: str | None = None) -> type[Self]:
        """Returns the metric that reads other outputs.

        Args:
            predictions: name of the output with the predictions.
            targets: name of the output with the targets; None for `targets`, else `labels`.

        Returns:
            A metric class for a collection's annotation.
        """
        return variant(cls, cls.__name__, predictions=predictions, targets=targets)  # pyright: ignore[reportArgumentType]

    @classmethod
    def _target_name(cls, available: Iterable[str]) -> str:
        if cls.targets is not None:
            return cls.targets
        return "labels" if "labels" in available and "targets" not in available else "targets"

    @classmethod
    def _pair(cls, outputs: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        """Returns predictions and targets, floats of one shape `[batch, ...]`, float32 at least."""
        predictions, targets = (
            jnp.asarray(outputs[name]) for name in (cls.predictions, cls._target_name(outputs))
        )
        _check_pair(cls.__name__, predictions, targets)
        dtype = jnp.promote_types(jnp.promote_types(predictions.dtype, targets.dtype), jnp.float32)
        return predictions.astype(dtype), targets.astype(dtype).reshape(predictions.shape)


def _check_pair(metric: str, predictions: Any, targets: Any) -> None:
    for array in (predictions, targets):
        if jnp.issubdtype(array.dtype, jnp.complexfloating):
            raise TypeError(f"{metric} compares real numbers, got {array.dtype}.")
    shapes = [tuple(array.shape) for array in (predictions, targets)]
    long, short = sorted(shapes, key=len, reverse=True)
    if not short or long not in (short, (*short, 1)):
        raise ValueError(
            f"{metric} got predictions of shape {list(shapes[0])} and targets of shape {list(shapes[1])}. {_ALLOWED}"
        )


class _Weighable(_Compared):
    """Compares outputs, each row with a weight where one is named."""

    @classmethod
    def with_weights(cls, weights: str) -> type[Self]:
        """Returns the metric in which rows have weights.

        Args:
            weights: name of the output with them, `[batch]`, or a longer leading part of the predictions' shape: what
                it leaves of that shape are the columns. `"weight"` for those of a `tk.Weighted` loss, summed by row.
                Where a weight is 0 the prediction may be NaN.

        Returns:
            A metric class for a collection's annotation.
        """
        return variant(cls, cls.__name__, weights=weights)  # pyright: ignore[reportArgumentType]

    @classmethod
    def _rows(
        cls, outputs: dict[str, Any], mask: jax.Array | None, shape: tuple[int, ...]
    ) -> tuple[int, ...]:
        """Returns the leading part of the predictions' `shape` that counts rows; the rest are columns."""
        if cls.weights is not None:
            rows = tuple(jnp.shape(outputs[cls.weights]))
        else:
            rows = shape[:1] if mask is None else tuple(mask.shape)
        if not rows or rows != shape[: len(rows)]:
            name = "mask" if cls.weights is None else f"weights {cls.weights!r}"
            raise ValueError(
                f"{cls.__name__} got {name} of shape {list(rows)} for predictions of shape {list(shape)}. Allowed are "
                "[batch] and every longer leading part of the predictions' shape."
            )
        return rows


@flax.struct.dataclass
class _MeanError(_Weighable, metrics.Average):
    """The mean over rows and columns of an error of each element."""

    total: jax.Array
    count: jax.Array

    @classmethod
    @abc.abstractmethod
    def _errors(cls, difference: jax.Array) -> jax.Array:
        """Returns the error of each element, of the shape of `difference`."""

    @classmethod
    def empty(cls) -> Self:
        """Returns the metric of no rows at all."""
        total, count = nothing(cls.weights)
        return cls(total=total, count=count)

    @classmethod
    def from_model_output(cls, *, mask: jax.Array | None = None, **outputs: jax.Array) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the metric of one batch.

        Args:
            mask: bool `[batch]`.
            **outputs: predictions and targets `[batch, ...]`, and the weights where they were named.

        Returns:
            The sum of the rows' mean errors, each times its weight, and the sum of the weights.

        Raises:
            ValueError: if the shapes don't fit.
        """
        predictions, targets = cls._pair(outputs)
        rows = cls._rows(outputs, mask, predictions.shape)
        errors = cls._errors(predictions - targets).reshape(*rows, -1).mean(axis=-1)
        total, count = weighted_sums(cls, errors, outputs, mask)
        return cls(total=total, count=count)

    def compute(self) -> Any:
        """Returns the mean error, float `[]`."""
        return self.total / self.count.astype(self.total.dtype)


@flax.struct.dataclass
class MAE(_MeanError):
    """The mean absolute error, every column with the same weight.

    Reads `predictions` `[batch, ...]` and `targets` of that shape, or `labels` where there are no targets;
    `from_outputs` names others and `with_weights` weighs rows. That is `sklearn.metrics.mean_absolute_error`.
    Without rows, or without weight, the result is NaN.

    Args:
        total: float `[]`, sum of the rows' errors, each times its weight.
        count: `[]`, int number of rows, or the float sum of their weights.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainkit.metrics import MAE
        >>> batch = {"predictions": jnp.array([1.0, 5.0]), "targets": jnp.array([2.0, 2.0])}
        >>> float(MAE.from_model_output(**batch).compute())
        2.0
    """

    total: jax.Array
    count: jax.Array

    @classmethod
    def _errors(cls, difference: jax.Array) -> jax.Array:
        return jnp.abs(difference)


@flax.struct.dataclass
class MSE(_MeanError):
    """The mean squared error, every column with the same weight.

    Reads what `MAE` reads. That is `sklearn.metrics.mean_squared_error`.

    Args:
        total: float `[]`, sum of the rows' errors, each times its weight.
        count: `[]`, int number of rows, or the float sum of their weights.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainkit.metrics import MSE
        >>> batch = {"predictions": jnp.array([1.0, 5.0]), "targets": jnp.array([2.0, 2.0])}
        >>> float(MSE.from_model_output(**batch).compute())
        5.0
    """

    total: jax.Array
    count: jax.Array

    @classmethod
    def _errors(cls, difference: jax.Array) -> jax.Array:
        return difference * difference


@flax.struct.dataclass
class R2(_Weighable, metrics.Metric):
    """The coefficient of determination, the mean of that of each column.

    Reads what `MAE` reads. That is `sklearn.metrics.r2_score(multioutput="uniform_average")`: a column whose targets
    are all the same scores 1 where the predictions are those, else 0. NaN with fewer than two rows.

    Means and sums of squared deviations are merged (Chan, Golub and LeVeque 1983, "Algorithms for computing the
    sample variance"), the means relative to a value among the targets, so that targets which vary little around a
    large value lose nothing in float32.

    Args:
        rows: int `[]`, number of rows with a weight.
        weight: float `[]`, sum of their weights, 1 for each where none are named.
        shift: float `[columns]`, a value in the range of the targets, to which `mean` is relative.
        mean: float `[columns]`, weighted mean of the targets less `shift`.
        m2: float `[columns]`, weighted sum of the targets' squared deviations from their mean.
        residual: float `[columns]`, weighted sum of squared errors.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainkit.metrics import R2
        >>> batch = {"predictions": jnp.array([1.0, 2.0, 2.0]), "targets": jnp.array([1.0, 2.0, 3.0])}
        >>> float(R2.from_model_output(**batch).compute())
        0.5
    """

    rows: jax.Array
    weight: jax.Array
    shift: jax.Array
    mean: jax.Array
    m2: jax.Array
    residual: jax.Array

    @classmethod
    def empty(cls) -> Self:
        """Returns the metric of no rows at all, of one column; merged with more columns it has as many."""
        # One array in two fields could not be donated.
        shift, mean, m2, residual = (jnp.zeros((1,), jnp.float32) for _ in range(4))
        weight = jnp.zeros((), jnp.float32)
        return cls(jnp.zeros((), jnp.int32), weight, shift, mean, m2, residual)

    @classmethod
    def from_model_output(cls, *, mask: jax.Array | None = None, **outputs: jax.Array) -> Self:
        """Returns the metric of one batch.

        Args:
            mask: bool `[batch]`.
            **outputs: predictions and targets `[batch, ...]`, and the weights where they were named.

        Returns:
            The moments of the targets and the squared errors.

        Raises:
            ValueError: if the shapes don't fit.
        """
        predictions, targets = cls._pair(outputs)
        rows = cls._rows(outputs, mask, predictions.shape)
        weights = jnp.asarray(1 if cls.weights is None else outputs[cls.weights]).astype(targets.dtype)
        weights, keep = broadcast_mask(jnp.broadcast_to(weights, rows), mask)
        keep = keep.reshape(-1, 1) & (weights.reshape(-1, 1) != 0)
        weights = jnp.where(keep, weights.reshape(-1, 1), 0)
        targets = targets.reshape(len(weights), -1)
        errors = jnp.where(keep, predictions.reshape(targets.shape) - targets, 0)
        weight = weights.sum()
        shift = _shift(targets, keep)
        deviations = jnp.where(keep, targets - shift[None], 0)
        mean = (weights * deviations).sum(axis=0) / (weight + (weight == 0).astype(weight.dtype))
        return cls(
            rows=keep.sum(dtype=jnp.int32),
            weight=weight,
            shift=shift,
            mean=mean,
            m2=(weights * jnp.where(keep, deviations - mean[None], 0) ** 2).sum(axis=0),
            residual=(weights * errors**2).sum(axis=0),
        )

    def merge(self, other: Self) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the moments of both sets of rows; NumPy leaves stay NumPy."""
        weight = self.weight + other.weight
        # Exactly 0 or 1 where one side is empty, which makes `empty()` an exact identity.
        share = other.weight / (weight + (weight == 0).astype(weight.dtype))
        nothing_yet = (self.weight == 0).astype(weight.dtype)
        shift = self.shift * (1 - nothing_yet) + other.shift * nothing_yet
        # Of two nearby shifts the difference is exact; of nothing the shift is no matter.
        delta = (other.shift - shift) * (other.weight != 0).astype(weight.dtype) + (other.mean - self.mean)
        return type(self)(
            rows=self.rows + other.rows,
            weight=weight,
            shift=shift,
            mean=self.mean + delta * share,
            m2=self.m2 + other.m2 + delta**2 * (self.weight * share),
            residual=self.residual + other.residual,
        )

    def compute(self) -> jax.Array | np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the score, float `[]`."""
        xp: Any = jnp if isinstance(self.m2, jax.Array) else np
        constant = self.m2 == 0
        explained = 1 - self.residual / (self.m2 + constant.astype(self.m2.dtype))
        same = (self.residual == 0).astype(self.m2.dtype)
        score = xp.where(constant, same, explained).mean()
        return xp.where(self.rows < 2, xp.asarray(xp.nan, score.dtype), score)


def _shift(targets: jax.Array, keep: jax.Array) -> jax.Array:
    """Returns a value for each column within the range of its kept targets: exactly theirs where all are the same."""
    kept = keep.sum(dtype=jnp.int32)
    rough = jnp.where(keep, targets / jnp.maximum(kept, 1).astype(targets.dtype), 0).sum(axis=0)
    low, high = jnp.where(keep, targets, jnp.inf).min(axis=0), jnp.where(keep, targets, -jnp.inf).max(axis=0)
    return jnp.where(kept > 0, jnp.clip(rough, low, high), 0)


@flax.struct.dataclass
class Spearman(_Compared, Collecting):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Spearman's rank correlation of predictions and targets, the mean of that of each column.

    Reads what `MAE` reads, and keeps all rows: exact, with ties at their average rank, in evaluations only. That is
    `scipy.stats.spearmanr`. NaN where a column is constant, holds NaN or has fewer than two rows. It has no weights.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainkit.metrics import Spearman
        >>> batch = {"predictions": jnp.array([0.1, 0.2, 9.0]), "targets": jnp.array([1, 2, 3])}
        >>> round(Spearman.from_model_output(**batch).compute(), 6)
        1.0
    """

    @classmethod
    def wanted(cls, available: Iterable[str]) -> tuple[str, ...]:
        """Returns the predictions, and the targets where there are any, or else the labels."""
        return cls.predictions, cls._target_name(available)

    @classmethod
    def from_rows(cls, rows: Rows) -> float:
        """Returns the correlation.

        Args:
            rows: predictions and targets, `[rows, ...]`.

        Returns:
            The mean of the columns' correlations, between -1 and 1, or NaN.

        Raises:
            ValueError: if the shapes don't fit.
        """
        predictions, targets = (rows[name] for name in cls.wanted(rows))
        _check_pair(cls.__name__, predictions, targets)
        pairs = zip(*(array.reshape(len(array), -1).T for array in (predictions, targets)), strict=True)
        return float(np.mean([_correlation(one, other) for one, other in pairs]))


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    if len(one) < 2 or any(np.isnan(column.astype(np.float64)).any() for column in (one, other)):
        return float("nan")
    a, b = (ranks - ranks.mean() for ranks in (average_ranks(one), average_ranks(other)))
    spread = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / spread) if spread else float("nan")
